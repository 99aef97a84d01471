"""Asks for answers, and runs them, many at once."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from bench.humaneval.answers import Answer, Answers
from bench.humaneval.asking import Asking
from bench.humaneval.sandbox import Sandbox
from bench.humaneval.setting import SETTINGS
from cluster.commands.serve import say
from workers.bench.problems import Problem

# Problems that are asked at the same time.
AT_ONCE = 16


class Measuring:
    """Asks, and runs the programs: one on each core, and the same program once."""

    def __init__(self, asking: Asking, answers: Answers, sandbox: Sandbox) -> None:
        self._asking, self._answers = asking, answers
        self._passes = cache(sandbox.passes)
        self._cores = ThreadPoolExecutor(os.cpu_count())
        self._free = asyncio.Semaphore(AT_ONCE)

    async def check(self, problems: Sequence[Problem]) -> None:
        """Raises RuntimeError unless all the problems' own solutions pass."""
        own = await asyncio.gather(*(self._run(each.program(each.solution)) for each in problems))
        wrong = [each.name for each, passed in zip(problems, own, strict=True) if not passed]
        if wrong:
            raise RuntimeError(
                f"the sandbox fails the authors' own solutions of {', '.join(wrong)}: its limits are too "
                "low for this machine; raise them in bench/humaneval/sandbox.py"
            )
        say(f"the authors' own solutions pass in the sandbox, {len(own)} of {len(own)}")

    async def measure(self, setting: str, problems: Sequence[Problem]) -> None:
        """Answers the problems that are not answered yet."""
        known = self._answers.of.get(setting, {})
        missing = [each for each in problems if each.name not in known]
        say(f"{setting}: {len(missing)} of {len(problems)} problems are to be answered")
        async with asyncio.TaskGroup() as group:
            for each in missing:
                group.create_task(self._answer(setting, each))

    async def _answer(self, setting: str, problem: Problem) -> None:
        async with self._free:
            reply = await self._asking.ask(problem, SETTINGS[setting])
        passed = await self._run(problem.program(reply.text))
        self._answers.add(setting, problem.name, Answer(reply, passed))

    async def _run(self, program: str) -> bool:
        return await asyncio.get_running_loop().run_in_executor(self._cores, self._passes, program)
