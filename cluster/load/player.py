"""Plays sessions against a cluster, each turn at its time whatever became of others."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.load.trace import Session
from pyramidserve import (
    AsyncClient,
    Compression,
    Receipt,
    RequestOptions,
    Sampling,
    Stopping,
    Tokens,
)
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import ClusterState

STATE_INTERVAL = 0.5


@dataclass
class Played:
    """One turn as its user saw it; seconds from the start of the run.

    Attributes:
        due: when it was to be sent: open loop, it does not wait for others.
        times: when each output token came.
        error: what it failed with, or "".
    """

    due: float
    prompt_tokens: int
    times: list[float] = field(default_factory=list)
    receipt: Receipt | None = None
    error: str = ""

    @property
    def first_token(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between output tokens."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Sample:
    """The cluster's state at a moment."""

    moment: float
    state: ClusterState


@dataclass
class Run:
    """All turns that were due in a run, and the cluster's states."""

    seconds: float
    turns: list[Played] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class Player:
    """Plays sessions through one connection, with prompts out of a text's ``token_ids``."""

    def __init__(
        self, client: AsyncClient, token_ids: Sequence[int], compression: Compression | None
    ) -> None:
        """``compression``: of all requests; None leaves it to the deployment."""
        self._client, self._ids, self._compression = client, token_ids, compression

    async def play(
        self, plan: Iterable[tuple[float, Session]], seconds: float, tell: Callable[[Run], None]
    ) -> Run:
        """Begins each session at its moment; ends all that is under way after ``seconds``.

        ``tell`` is called with every sample.
        """
        run = Run(seconds)
        began = time.perf_counter()
        watching = asyncio.create_task(self._watch(run, began, tell))
        users = [
            asyncio.create_task(self._session(run, began, moment, number, session))
            for number, (moment, session) in enumerate(plan)
        ]
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*users, watching)
        except TimeoutError:
            pass  # that is how a run ends
        finally:
            tasks = [*users, watching]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return run

    async def _watch(self, run: Run, began: float, tell: Callable[[Run], None]) -> None:
        while True:
            state = await self._client.cluster_state()
            run.samples.append(Sample(time.perf_counter() - began, state))
            tell(run)
            await asyncio.sleep(STATE_INTERVAL)

    async def _session(self, run: Run, began: float, moment: float, number: int, session: Session) -> None:
        for index, turn in enumerate(session.turns):
            await asyncio.sleep(began + moment - time.perf_counter())
            played = Played(moment, session.prompt_tokens(index))
            run.turns.append(played)
            await self._turn(played, began, number, turn.answer_tokens)
            if played.error:
                return
            moment = time.perf_counter() - began + turn.thinking

    async def _turn(self, played: Played, began: float, number: int, answer_tokens: int) -> None:
        start = number * 997 % max(1, len(self._ids) - played.prompt_tokens)
        prompt = self._ids[start : start + played.prompt_tokens]
        options = RequestOptions(
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=answer_tokens, ignore_eos=True),
        )
        if self._compression:
            options["compression"] = self._compression
        try:
            async with self._client.stream(prompt, **options) as events:
                async for event in events:
                    now = time.perf_counter() - began
                    if isinstance(event, Tokens):
                        played.times += [now] * len(event.token_ids)
                    elif isinstance(event, Receipt):
                        played.receipt = event
        except PyramidServeError as error:
            played.error = error.reason
