"""HumanEval through a cluster's HTTP API, under several compressions.

Answers are kept in a file beside ``--out``: the same command goes on where it was stopped.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import AsyncOpenAI

from bench.humaneval.answers import Answers
from bench.humaneval.asking import STOPS, Asking
from bench.humaneval.measuring import Measuring
from bench.humaneval.report import report, table
from bench.humaneval.sandbox import Sandbox, can_be_apart
from bench.humaneval.setting import SETTINGS
from cluster.commands.serve import say
from workers.bench.problems import REQUIREMENT, Problem, fetch, read

CONFIG = Path(__file__).with_name("cluster.yaml")
TURNS = (
    "A setting of two turns has the problem and one token of output in the first turn of a session; the "
    "second turn's prompt is the first one's and the text of that token."
)


@dataclass(frozen=True)
class Work:
    """What is asked: ``problems`` in ``settings``, for answers of ``max_tokens`` at most."""

    problems: Sequence[Problem]
    settings: Sequence[str]
    max_tokens: int


async def measure(url: str, work: Work, out: Path) -> None:
    """Measures at a router's ``url``; prints a table and writes the figures."""
    sandbox = Sandbox(can_be_apart())
    if not sandbox.apart:
        say("unshare is refused here: nothing but Python's audit hook keeps programs from the network")
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        (model,) = (await client.models.list()).data
        conditions = {
            "problems": REQUIREMENT,
            "model": model.id,
            "max_tokens": work.max_tokens,
            "temperature": 0,
            "stop": STOPS,
            "settings": {name: asdict(each) for name, each in SETTINGS.items()},
            "turns": TURNS,
        }
        answers = Answers(out.with_suffix(".answers.json"), conditions)
        measuring = Measuring(Asking(client, model.id, work.max_tokens), answers, sandbox)
        await measuring.check(work.problems)
        for name in work.settings:
            await measuring.measure(name, work.problems)
    asked = {name: answers.of[name] for name in work.settings}
    found = report(asked, [each.name for each in work.problems])
    count = len(work.problems)
    told = {**conditions, "count": count, "sandbox": asdict(sandbox), "results": found}
    out.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{table(found, count)}\n\n{TURNS}")


def main() -> None:
    """Measures at a server that is there, or on a cluster of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.humaneval", description=__doc__)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="of a server that runs, as http://127.0.0.1:8701")
    server.add_argument(
        "--config", type=Path, default=CONFIG, metavar="FILE", help="of a server that is started for this"
    )
    parser.add_argument("--problems", type=int, default=164, metavar="N", help="the first; default: all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    problems = read(fetch())
    if not 1 <= arguments.problems <= len(problems):
        parser.error(f"--problems is {arguments.problems}; it must be 1 to {len(problems)}")
    if arguments.max_tokens < 2:
        parser.error(f"--max-tokens is {arguments.max_tokens}; it must be 2 or more, one for each turn")
    work = Work(problems[: arguments.problems], arguments.settings, arguments.max_tokens)
    if arguments.url:
        asyncio.run(measure(arguments.url.rstrip("/"), work, arguments.out))
        return
    from cluster.deploy.deployment import read_deployment
    from cluster.deploy.serving import serving

    deployment = read_deployment(arguments.config)
    with serving(deployment, "", say):
        asyncio.run(measure(f"http://127.0.0.1:{deployment.config.http_port}", work, arguments.out))


if __name__ == "__main__":
    main()
