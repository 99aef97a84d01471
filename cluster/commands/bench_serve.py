"""`pyramidserve bench serve`: what chat users would see of a running cluster."""

import argparse
import asyncio
import itertools
import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from cluster.commands.policy import add_policy_arguments, compression_of
from cluster.commands.serve import say
from cluster.load.player import Player, Run
from cluster.load.plot import draw
from cluster.load.report import Objective, series, summarise
from cluster.load.trace import SOURCE, Session, arrivals, read_trace
from pyramidserve import AsyncClient
from pyramidserve.commands.connection import add_connection_arguments, connection
from pyramidserve.errors import InvalidRequestError
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.tokenizer import Tokenizer
from workers.percentile import percentile

TRACE = Path(__file__).parents[1] / "load" / "chat.json"
DESCRIPTION = "open-loop chat traffic against a running cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the subject."""
    add_connection_arguments(parser)
    parser.add_argument("--trace", type=Path, default=TRACE, help="sessions to play; default: chat.json")
    parser.add_argument("--arrivals", choices=("poisson", "bursty", "diurnal"), default="poisson")
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[1.0], help="turns a second; several are played one by one"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds of it that do not count")
    parser.add_argument(
        "--ttft", type=float, default=5.0, help="objective: seconds to the first token, p99"
    )
    parser.add_argument(
        "--inter-token", type=float, default=0.2, help="objective: a turn's mean seconds a token, p99"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=EMBEDDED, help="whose tokenizer makes the prompts")
    add_policy_arguments(parser, None)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the last run over time")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plays the trace at every rate and prints what users saw."""
    finite = all(0 < rate < math.inf for rate in arguments.rate)
    if not finite or not 0 <= arguments.warm_up < arguments.seconds:
        raise InvalidRequestError(
            f"--rate {arguments.rate}, --warm-up {arguments.warm_up}, --seconds {arguments.seconds}: "
            "rates must be finite and above 0, and the warm-up shorter than the run"
        )
    sessions = read_trace(arguments.trace)
    print(describe_trace(sessions))
    runs = asyncio.run(_play_all(arguments, sessions))
    within = [each["rate"] for each in runs if each["within_objective"]]
    if len(runs) > 1:
        print(f"highest rate within the objective: {max(within, default=0):g} turns/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1))
    if arguments.plot:
        draw(runs[-1]["series"], f"{arguments.arrivals}, {runs[-1]['rate']:g} turns/s", arguments.plot)
    return 0


async def _play_all(arguments: argparse.Namespace, sessions: list[Session]) -> list[dict[str, Any]]:
    tokenizer = Tokenizer(resolve_checkpoint(arguments.model, say))
    token_ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    compression = None
    if arguments.policy:
        compression = compression_of(arguments)
    objective = Objective(arguments.ttft, arguments.inter_token)
    turns = sum(len(session.turns) for session in sessions) / len(sessions)
    results = []
    async with AsyncClient(**connection(arguments)) as client:
        player = Player(client, token_ids, compression)
        for rate in arguments.rate:
            moments = arrivals(arguments.arrivals, rate / turns, arguments.seconds, arguments.seed)
            plan = zip(moments, itertools.cycle(sessions), strict=False)
            played = await player.play(plan, arguments.seconds, _Progress())
            told = summarise(played, objective, arguments.warm_up)
            results.append(
                {"rate": rate, "compression": arguments.policy, **told, "series": series(played, objective)}
            )
            print(describe(results[-1]), flush=True)
            await _until_idle(client)
    return results


async def _until_idle(client: AsyncClient) -> None:
    """Waits for what was cut off to be gone."""
    while (state := await client.cluster_state()).running or state.queued:
        await asyncio.sleep(0.1)


class _Progress:
    """Tells every ten seconds how a run goes."""

    def __init__(self) -> None:
        self._due = 10.0

    def __call__(self, run: Run) -> None:
        moment, state = run.samples[-1].moment, run.samples[-1].state
        if moment >= self._due:
            self._due += 10
            done = sum(turn.receipt is not None for turn in run.turns)
            say(f"{moment:.0f} s: {done} turns done, {state.running} running, {state.queued} queued")


def describe_trace(sessions: list[Session]) -> str:
    """The lengths that are played."""
    turns = [(session, index) for session in sessions for index in range(len(session.turns))]
    prompts = [float(session.prompt_tokens(index)) for session, index in turns]
    answers = [float(session.turns[index].answer_tokens) for session, index in turns]
    quantiles = [
        f"{name} p5 {percentile(values, 5):.0f}, p50 {percentile(values, 50):.0f}, "
        f"p95 {percentile(values, 95):.0f}, mean {sum(values) / len(values):.0f}"
        for name, values in (("prompts", prompts), ("answers", answers))
    ]
    return (
        f"{len(sessions)} sessions, {len(turns)} turns ({SOURCE}); tokens of {quantiles[0]}; {quantiles[1]}"
    )


def describe(told: dict[str, Any]) -> str:
    """One run in a few lines."""
    used = told["pool_used_when_queued"]
    return "\n".join(
        (
            f"{told['rate']:g} turns/s: {told['turns_done']} of {told['turns_due']} turns done, "
            f"{told['requests_per_second']:.2f}/s, {told['goodput_per_second']:.2f}/s within the "
            f"objective, {told['output_tokens_per_second']:.0f} output tokens/s"
            + (f", failed {told['turns_failed']}" if told["turns_failed"] else ""),
            f"  first token p50 {told['ttft_p50']:.2f} s, p99 {told['ttft_p99']:.2f} s; inter-token "
            f"p50 {told['inter_token_p50'] * 1000:.0f} ms, p99 {told['inter_token_p99'] * 1000:.0f} ms; "
            f"objective {'met' if told['within_objective'] else 'missed'}",
            f"  queued {told['queued_mean']:.1f}, running {told['running_mean']:.1f} on average; "
            f"pool in use {'never queued' if used is None else f'{used:.0%} while some waited'}; "
            f"{told['preemptions']} preemptions",
        )
    )
