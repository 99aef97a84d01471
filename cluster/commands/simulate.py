"""`pyramidserve simulate`: a cluster that is not there, under chat traffic."""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from cluster.commands.bench_serve import TRACE, describe_trace
from cluster.commands.policy import add_policy_arguments, compression_here, kept_at_most
from cluster.load.report import Objective
from cluster.load.trace import arrivals, read_trace
from cluster.simulation.calibration import fit, machine, predict, read_measured
from cluster.simulation.report import summarise
from cluster.simulation.run import Simulation
from cluster.simulation.setup import MODELS, SHARDS, USUAL, Scaling, gpu_setup
from cluster.simulation.timing import Costs
from pyramidserve.errors import InvalidRequestError
from workers.budget.kv_format import KV_DTYPES
from workers.model.work import Limits
from workers.policies.valid import validate

SUMMARY = "simulate clusters of 80 GB GPUs under chat traffic, with the router's own decisions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--model", choices=MODELS, default="7b", help="of Llama 2; default: 7b")
    parser.add_argument("--shards", type=int, metavar="N", help="GPUs a pipeline; default: 1, for 70b 3")
    parser.add_argument(
        "--pipelines", type=int, nargs="+", default=[1], metavar="N", help="several are run one by one"
    )
    parser.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES, help="auto: that of weights")
    parser.add_argument("--max-pipelines", type=int, metavar="N", help="lets the autoscaler add some")
    parser.add_argument("--trace", type=Path, default=TRACE, help="sessions to play; default: chat.json")
    parser.add_argument("--arrivals", choices=("poisson", "bursty", "diurnal"), default="poisson")
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[4.0], help="turns a second for each of --pipelines"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="that are simulated")
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds of it that do not count")
    parser.add_argument("--ttft", type=float, default=5.0, help="objective: seconds to the first token")
    parser.add_argument("--inter-token", type=float, default=0.1, help="objective: mean seconds a token")
    parser.add_argument("--seed", type=int, default=0)
    add_policy_arguments(parser, "pyramid")
    parser.add_argument(
        "--measured", type=Path, nargs="+", default=[], metavar="FILE",
        help="what `bench engine --json` wrote: how far from its limits a device stays",
    )  # fmt: skip
    parser.add_argument(
        "--check", type=Path, nargs="+", default=[], metavar="FILE",
        help="other such files, whose times are predicted from --measured; nothing else is simulated",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers")


def run(arguments: argparse.Namespace) -> int:
    """Simulates every number of pipelines at every rate, or checks the calibration."""
    _validate(arguments)
    measured = [read_measured(file) for file in arguments.measured]
    costs = fit(measured) if measured else USUAL
    print(describe_costs(costs, bool(measured)))
    if arguments.check:
        results = _check(arguments.check, costs, machine(measured))
    else:
        results = _simulate(arguments, costs)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"costs": dataclasses.asdict(costs), "results": results}, indent=1)
        )
    return 0


def _validate(arguments: argparse.Namespace) -> None:
    if arguments.check and not arguments.measured:
        raise InvalidRequestError("--check needs --measured: files to predict from")
    finite = all(0 < rate < math.inf for rate in arguments.rate)
    if not finite or not 0 <= arguments.warm_up < arguments.seconds - arguments.ttft:
        raise InvalidRequestError(
            f"--rate {arguments.rate}, --warm-up {arguments.warm_up}, --seconds {arguments.seconds}, "
            f"--ttft {arguments.ttft}: rates must be finite and above 0, and the warm-up shorter than the "
            "run by more than the objective"
        )
    most = arguments.max_pipelines
    if min(arguments.pipelines) < 1 or (most is not None and most < max(arguments.pipelines)):
        raise InvalidRequestError(
            f"--pipelines {arguments.pipelines}, --max-pipelines {most}: give 1 or more, and no "
            "more than the maximum"
        )
    if arguments.shards is not None and not 1 <= arguments.shards <= MODELS[arguments.model].layers:
        raise InvalidRequestError(
            f"--shards is {arguments.shards}; {arguments.model} can have 1 to "
            f"{MODELS[arguments.model].layers}"
        )
    validate(kept_at_most(compression_here(arguments)))


def _simulate(arguments: argparse.Namespace, costs: Costs) -> list[dict[str, Any]]:
    sessions = read_trace(arguments.trace)
    print(describe_trace(sessions))
    objective = Objective(arguments.ttft, arguments.inter_token)
    turns = sum(len(session.turns) for session in sessions) / len(sessions)
    shards = arguments.shards or SHARDS[arguments.model]
    scaling = Scaling(arguments.max_pipelines) if arguments.max_pipelines else None
    compression, results = kept_at_most(compression_here(arguments)), []
    for pipelines, rate in itertools.product(arguments.pipelines, arguments.rate):
        setup = gpu_setup(
            arguments.model, shards, compression, costs, pipelines, scaling, arguments.kv_dtype
        )
        setup = dataclasses.replace(setup, queue_limit=setup.queue_limit * pipelines)
        begins = arrivals(arguments.arrivals, rate * pipelines / turns, arguments.seconds, arguments.seed)
        plan = zip(begins, itertools.cycle(sessions), strict=False)
        told = summarise(Simulation(setup).run_chat(plan, arguments.seconds), objective, arguments.warm_up)
        results.append({"pipelines": pipelines, "rate": rate, **told})
        print(describe(arguments.model, shards, results[-1]), flush=True)
    return results


def _check(files: list[Path], costs: Costs, limits: Limits) -> list[dict[str, Any]]:
    """Compares what is predicted with what was measured."""
    results, errors = [], []
    for each in map(read_measured, files):
        predicted = predict(each, costs, limits)
        error = predicted / each.wall_seconds - 1
        errors.append(abs(error))
        results.append(
            {
                "workload": each.name,
                "policy": each.compression.policy,
                "measured_seconds": each.wall_seconds,
                "predicted_seconds": predicted,
                "error": error,
            }
        )
        print(
            f"{each.name:>12} {each.compression.policy:8} measured {each.wall_seconds:7.2f} s, "
            f"predicted {predicted:7.2f} s: {error:+.0%}"
        )
    print(f"median error {median(errors):.0%} over {len(errors)}, at most {max(errors):.0%}")
    return results


def describe_costs(costs: Costs, measured: bool) -> str:
    """How far from its limits the device is taken to stay."""
    source = "as measured" if measured else "as is usual; calibrate with --measured"
    parts = ", ".join(f"{name} {times:.2f}" for name, times in dataclasses.asdict(costs).items())
    return f"times the least that a device could take, {source}: {parts}"


def describe(model: str, shards: int, told: dict[str, Any]) -> str:
    """One run in a few lines."""
    refused = f", {told['turns_refused']} refused" if told["turns_refused"] else ""
    return "\n".join(
        (
            f"{told['pipelines']} pipelines of {shards} GPUs, {model}, {told['rate']:g} turns/s each: "
            f"{told['requests_per_second']:.1f}/s done, {told['goodput_per_second']:.1f}/s within the "
            f"objective ({'met' if told['within_objective'] else 'missed'}), "
            f"{told['output_tokens_per_second']:.0f} output tokens/s{refused}",
            f"  first token p50 {told['ttft_p50']:.2f} s, p90 {told['ttft_p90']:.2f} s, "
            f"p99 {told['ttft_p99']:.2f} s; in the queue p50 {told['queue_p50']:.2f} s, "
            f"p90 {told['queue_p90']:.2f} s, p99 {told['queue_p99']:.2f} s; "
            f"inter-token, means of turns, p50 {told['turn_inter_token_p50'] * 1000:.0f} ms, "
            f"p99 {told['turn_inter_token_p99'] * 1000:.0f} ms",
            f"  memory filled {told['memory_filled']:.0%}, running {told['running_mean']:.0f}, "
            f"pipelines {told['pipelines_mean']:.1f} (at most {told['pipelines_most']}), "
            f"{told['preemptions']} preemptions; {told['decisions']} decisions, "
            f"{told['decisions_per_second']:.0f}/s",
        )
    )
