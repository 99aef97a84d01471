"""Begins what was asked for and sends what comes of it, until the client has gone."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cluster.front.front import Front
from cluster.http.asking import Asked
from cluster.http.choice import Choice
from cluster.http.errors import response_of
from cluster.route.live import Follower
from pyramidserve.errors import PyramidServeError, RequestTimeoutError
from pyramidserve.types import Event, Receipt, Started, Tokens

Respond = Callable[[Response], Awaitable[None]]

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies pass on what there is
}


class Reply(Protocol):
    """Takes in what comes of choices; says it in chunks, or as a whole.

    ``done`` ends a stream.
    """

    done: bytes

    @property
    def choices(self) -> Sequence[Choice]: ...
    def begin(self, choice: Choice) -> bytes: ...
    def add(self, choice: Choice, tokens: Tokens) -> bytes: ...
    def end(self, choice: Choice, receipt: Receipt) -> bytes: ...
    def whole(self) -> dict[str, Any]: ...
    def fail(self, error: PyramidServeError) -> bytes: ...


@dataclass(frozen=True)
class Call:
    """Whose call it is, by which name, and how many seconds it may take."""

    path: str
    tenant: str
    name: str
    seconds: float | None


class Answer(Response):
    """Streams a reply, or sends it as a whole."""

    def __init__(
        self, front: Front, call: Call, asked: Sequence[Asked], reply: Reply, streams: bool
    ) -> None:
        super().__init__()
        self._front, self._call, self._asked = front, call, asked
        self._reply, self._streams = reply, streams
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs all of it; nothing is left where the client goes before the end."""

        async def respond(response: Response) -> None:
            await response(scope, receive, send)

        await _unless_gone(self._run(send, respond), receive)

    async def _run(self, send: Send, respond: Respond) -> None:
        call = self._call
        try:
            try:
                async with asyncio.timeout(call.seconds), AsyncExitStack() as stack:
                    await self._send_all(send, respond, await self._begin(stack))
            except TimeoutError as late:
                raise RequestTimeoutError(
                    f"deadline is {call.seconds:g} s, and it passed before all was there; give more, or "
                    "ask for less"
                ) from late
        except Exception as raised:
            ids = {"request_id": call.name, "tenant": call.tenant}
            error = self._front.refusal(raised, call.path, ids)
            if self._begun:
                await _more(send, self._reply.fail(error), last=True)
            else:
                await respond(response_of(error, self._named))

    async def _begin(self, stack: AsyncExitStack) -> list[Follower]:
        """A stream of each choice, in their order; all are closed with ``stack``."""
        seconds = math.inf if self._call.seconds is None else self._call.seconds
        followers = []
        front, tenant = self._front, self._call.tenant
        for each, choice in zip(self._asked, self._reply.choices, strict=True):
            follower = await front.begin(tenant, each.request, seconds, each.salt)
            stack.callback(follower.close)
            choice.session_id, choice.compression = front.session_of(tenant, follower), follower.compression
            followers.append(follower)
        return followers

    @property
    def _named(self) -> dict[str, str]:
        return {"X-Request-Id": self._call.name}

    async def _send_all(self, send: Send, respond: Respond, followers: Sequence[Follower]) -> None:
        reply = self._reply
        async with aclosing(_events(followers)) as events:
            async for index, new in events:
                if self._streams and not self._begun:
                    self._begun = True
                    await _start(send, STREAM_HEADERS | self._named)
                chunk = _taken(reply, reply.choices[index], new)
                if self._streams and chunk:
                    await _more(send, chunk)
        if self._streams:
            await _more(send, reply.done, last=True)
        else:
            await respond(JSONResponse(reply.whole(), headers=self._named))


def _taken(reply: Reply, choice: Choice, new: Event) -> bytes:
    """The chunk of an event that has come of ``choice``."""
    match new:
        case Started():
            choice.begin(new.prompt_tokens)
            return reply.begin(choice)
        case Tokens():
            return reply.add(choice, new)
        case Receipt():
            return reply.end(choice, new)


async def _events(followers: Sequence[Follower]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all, as they come, with whose they are. Raises what one of them raises."""
    if len(followers) == 1:
        async for new in followers[0]:
            yield 0, new
        return
    coming = {asyncio.create_task(_next(follower)): index for index, follower in enumerate(followers)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = coming.pop(task)
                if (event := task.result()) is not None:
                    yield index, event
                    coming[asyncio.create_task(_next(followers[index]))] = index
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)


async def _next(follower: Follower) -> Event | None:
    """The next event; None behind the last."""
    return await anext(follower, None)


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs ``work``, and cancels it when the client goes."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, headers: dict[str, str]) -> None:
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})


async def _more(send: Send, chunk: bytes, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": not last})
