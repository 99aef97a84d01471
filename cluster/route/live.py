"""A request that waits or runs, and the streams that watch it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from cluster.admit.request import ValidatedRequest
from cluster.route.pacer import Pacer
from pyramidserve.errors import EngineError, PyramidServeError, RequestConflictError
from pyramidserve.tools import whole_calls
from pyramidserve.types import Compression, Event, Receipt, Started, Tokens
from workers.model.transcript import Transcript
from workers.percentile import percentile


class LiveRequest:
    """One list of output, however many streams follow it.

    Attributes:
        tenant: who asked for it.
        arrived: when the request arrived; seconds, as all times here, on the router's clock.
        deadline: when its client gives up, or infinite.
        sent: when it was last sent to a pipeline that had room, before any was lost.
        pipeline_id: the pipeline that it was last sent to, or "".
        sequence_id: its name there, or 0.
        losses: pipelines that were lost while they ran it.
        session_id: whose turn it is; "" also once that session has been ended.
    """

    def __init__(
        self,
        request: ValidatedRequest,
        tenant: str,
        arrived: float,
        deadline: float,
        abandoned: Callable[["LiveRequest"], None],
        pacer: Pacer,
    ) -> None:
        """A request that has no output yet.

        Args:
            abandoned: called when the last follower leaves before the end.
            pacer: says when followers are told of output behind the first.
        """
        self.request = request
        self.tenant = tenant
        self.arrived = arrived
        self.deadline = deadline
        self.sent = arrived
        self.pipeline_id, self.sequence_id = "", 0
        self.losses = 0
        self.session_id = request.session_id
        self._abandoned = abandoned
        self._pacer = pacer
        self._chunks: list[Tokens] = []
        self._told = 0
        self._times: list[float] = []
        self._end: Receipt | PyramidServeError | None = None
        self._followers: set[Follower] = set()

    @property
    def ids(self) -> dict[str, str]:
        """Who it is, in events."""
        return {"request_id": self.request.request_id, "tenant": self.tenant}

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def output_ids(self) -> list[int]:
        """All output so far, that which the client sent along included."""
        own = (token_id for chunk in self._chunks for token_id in chunk.token_ids)
        return [*self.request.resume_output_ids, *own]

    @property
    def output_tokens(self) -> int:
        """How many ``output_ids`` there are."""
        return len(self.request.resume_output_ids) + len(self._times)

    def transcript(self) -> Transcript | None:
        """What it consisted of, if it was a turn of a conversation and all its text is known here."""
        request = self.request
        if request.chat is None or request.resume_output_ids:
            return None
        reply = "".join(chunk.text for chunk in self._chunks)
        calls = whole_calls(part for chunk in self._chunks for part in chunk.tool_calls)
        return Transcript.of(request.chat, reply, request.prompt_ids, self.output_ids, calls)

    @property
    def followers(self) -> int:
        return len(self._followers)

    def follow(self, resume_output_ids: Sequence[int]) -> "Follower":
        """A stream of all that comes behind ``resume_output_ids``; close it in any case.

        Raises:
            RequestConflictError: the output so far does not have those ids, or has its first text
                only behind them.
        """
        output = list(self.request.resume_output_ids)
        ends = [len(output)]
        for chunk in self._chunks:
            output += chunk.token_ids
            ends.append(len(output))
        count = len(resume_output_ids)
        if count not in ends or output[:count] != list(resume_output_ids):
            raise RequestConflictError(
                f"request_id {self.request.request_id!r} is running, and its streams never brought "
                f"the {count} resume_output_ids given; send those they did, or another request_id"
            )
        follower = Follower(self, ends.index(count))
        self._followers.add(follower)
        return follower

    def send(self, pipeline_id: str, sequence_id: int, now: float) -> None:
        """Notes that a pipeline runs it from now on, as ``sequence_id``."""
        self.pipeline_id, self.sequence_id = pipeline_id, sequence_id
        if not self.losses:
            self.sent = now

    def append(self, tokens: Tokens, now: float) -> bool:
        """Adds new output, to be told when the pacer says so; returns whether it is the first.

        Raises EngineError if it leaves a gap or is more than was asked for.
        """
        length = self.output_tokens
        after = length + len(tokens.token_ids)
        if tokens.index != length or after > self.request.max_tokens:
            raise EngineError(
                f"the pipeline sent output {tokens.index} to {after} where {length} was due and "
                f"{self.request.max_tokens} is the end"
            )
        first = not self._chunks
        self._chunks.append(tokens)
        self._times += [now] * len(tokens.token_ids)
        if self._told:
            self._pacer.add(self)
        else:
            self.tell()
        return first

    def tell(self) -> None:
        """Tells all followers of what there is."""
        self._told = len(self._chunks)
        for follower in self._followers:
            follower.wake()

    def gaps(self) -> list[float]:
        """Seconds between output tokens."""
        return [after - before for before, after in pairwise(self._times)]

    def finish(self, receipt: Receipt, pipeline_id: str) -> Receipt:
        """Ends the reply with ``receipt``, which it returns completed with the times seen here."""
        gaps = self.gaps()
        self._end = completed = replace(
            receipt,
            queue_time=self.sent - self.arrived,
            time_to_first_token=self._times[0] - self.arrived if self._times else 0.0,
            inter_token_p50=percentile(gaps, 50),
            inter_token_p99=percentile(gaps, 99),
            pipeline_id=pipeline_id,
            replays=self.losses,
        )
        self.tell()
        return completed

    def fail(self, error: PyramidServeError) -> None:
        """Ends the reply with ``error``, which every follower raises."""
        self._end = error
        self.tell()


class Follower(AsyncIterator[Event]):
    """One stream of a live request: Started, Tokens, then the Receipt or the error.

    What has gathered since the last event comes as one Tokens. It holds an index into the request's output
    and nothing else, so a slow client costs no memory.
    """

    def __init__(self, live: LiveRequest, position: int) -> None:
        self._woken = asyncio.Event()
        self._live = live
        self._position = position
        self._announced = False
        self._ended = False

    @property
    def session_id(self) -> str:
        """Whose turn it is; "": nobody's."""
        return self._live.session_id

    @property
    def compression(self) -> Compression:
        """How its KV cache is compressed."""
        return self._live.request.compression

    def wake(self) -> None:
        """There is something new."""
        self._woken.set()

    async def __anext__(self) -> Event:
        live = self._live
        if not self._announced:
            self._announced = True
            await asyncio.sleep(0)  # the order to run it goes out first
            return Started(len(live.request.prompt_ids), live.request.seed)
        while self._position >= live._told and live._end is None:
            self._woken.clear()
            await self._woken.wait()
        if self._position < live._told:
            chunks = live._chunks[self._position : live._told]
            self._position += len(chunks)
            return Tokens(
                chunks[0].index,
                tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
                "".join(chunk.text for chunk in chunks),
                tuple(each for chunk in chunks for each in chunk.logprobs),
                tuple(part for chunk in chunks for part in chunk.tool_calls),
            )
        if self._ended or live._end is None:
            raise StopAsyncIteration
        self._ended = True
        if isinstance(live._end, PyramidServeError):
            raise live._end
        return live._end

    def close(self) -> None:
        """Stops following; the last follower to leave before the end abandons the request."""
        live = self._live
        if self in live._followers:
            live._followers.remove(self)
            if not live._followers and not live.ended:
                live._abandoned(live)
