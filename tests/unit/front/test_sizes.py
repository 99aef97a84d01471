"""What cannot fit is refused unread, and what takes long to read keeps nobody else waiting."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from fake_head import PATIENCE
from letters import CONTEXT, FACTS, AnyGrammar, Letters
from test_request_validation import DEFAULT, chat, message

from cluster.front import reading
from cluster.front.reading import SHORT_BYTES, Reading
from cluster.front.validation import validate_request
from pyramidserve.errors import InvalidRequestError, OverloadedError
from pyramidserve.types import Compression
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import compression_to_message
from workers.schedule.validation import LONGEST_SEQUENCE

LONG = SHORT_BYTES + 1


class Unread(Letters):
    """Fails when it is to tokenise anything."""

    characters_per_token = 4

    def encode(self, text: str) -> list[int]:
        raise AssertionError("this should not have been tokenised")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            message(text="x" * (4 * CONTEXT + 1)),
            f"{4 * CONTEXT + 1} characters, .* {CONTEXT + 1} tok",
        ),
        (message(chat=chat(("system", "x" * 2 * CONTEXT), ("user", "x" * 3 * CONTEXT))), "at least"),
        (message(token_ids=pb.TokenIds(ids=[1] * CONTEXT)), f"has {CONTEXT + 3} tokens"),
        (message(resume_output_ids=[1] * CONTEXT), "resume_output_ids"),
    ],
)
def test_what_cannot_fit_is_refused_by_its_size(asked: pb.GenerateRequest, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as raised:
        validate_request(asked, None, Unread(), FACTS, DEFAULT, AnyGrammar())
    assert str(CONTEXT) in raised.value.message


@pytest.mark.parametrize(
    "asked",
    [
        message(text="x" * 4 * CONTEXT),
        # Templates may strip contents, and leave out what the assistant has thought.
        message(chat=chat(("user", "x" + " " * 9 * CONTEXT))),
        message(chat=chat(("user", "x"), ("assistant", "x" * 9 * CONTEXT), ("user", "x"))),
    ],
)
def test_what_may_fit_is_read(asked: pb.GenerateRequest) -> None:
    with pytest.raises(AssertionError, match="tokenised"):
        validate_request(asked, None, Unread(), FACTS, DEFAULT, AnyGrammar())


def test_a_tokenizer_without_a_bound_reads_all() -> None:
    class Unbounded(Unread):
        characters_per_token = None  # type: ignore[assignment]

    with pytest.raises(AssertionError, match="tokenised"):
        validate_request(message(text="x" * 99 * CONTEXT), None, Unbounded(), FACTS, DEFAULT, AnyGrammar())


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_short_request_does_not_wait_for_long_ones_and_tenants_take_turns() -> None:
    async def scenario() -> None:
        threads, go_on, order = Reading(), threading.Event(), list[str]()

        def work(name: str) -> str:
            assert go_on.wait(PATIENCE)
            order.append(name)
            return name

        def ask(tenant: str, name: str) -> "asyncio.Task[str]":
            return asyncio.create_task(threads.read(tenant, LONG, partial(work, name)))

        asked = [ask("a", f"a{number}") for number in range(4)]
        await asyncio.sleep(0)
        asked += [ask("b", f"b{number}") for number in range(2)]
        assert await threads.read("a", SHORT_BYTES, lambda: "short") == "short"
        assert not order
        go_on.set()
        await asyncio.gather(*asked)
        assert order == ["a0", "b0", "a1", "b1", "a2", "a3"]

    run(scenario)


def test_a_tenant_has_so_much_waiting_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAITING_BYTES", 2 * LONG)

    async def scenario() -> None:
        threads, go_on = Reading(), threading.Event()
        asked = [asyncio.create_task(threads.read("a", LONG, go_on.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=r"of tenant 'a' wait to be tokenised") as raised:
            await threads.read("a", 1, go_on.wait)
        assert raised.value.retry_delay
        others = asyncio.create_task(threads.read("b", LONG, go_on.wait))
        go_on.set()
        await asyncio.gather(*asked, others)
        # Larger than all that may wait: alone it is read.
        await threads.read("a", 3 * LONG, go_on.wait)

    run(scenario)


def test_one_who_has_gone_leaves_its_turn_to_the_next() -> None:
    async def scenario() -> None:
        threads, go_on = Reading(), threading.Event()
        gone = asyncio.create_task(threads.read("a", LONG, go_on.wait))
        stays = asyncio.create_task(threads.read("a", LONG, lambda: True))
        await asyncio.sleep(0)
        gone.cancel()
        go_on.set()
        assert await stays

    run(scenario)


STREAMING = compression_to_message(Compression("streaming", parameters={"window": 40}))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            message(token_ids=pb.TokenIds(ids=[1] * LONGEST_SEQUENCE), compression=STREAMING),
            "the prompt has",
        ),
        (message(text="x" * (4 * LONGEST_SEQUENCE + 1), compression=STREAMING), "characters"),
        (message(resume_output_ids=[1] * LONGEST_SEQUENCE, compression=STREAMING), "resume_output_ids has"),
    ],
)
def test_what_outgrows_the_context_is_bounded_by_the_longest_sequence(
    asked: pb.GenerateRequest, why: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"{why}.*longest sequence is {LONGEST_SEQUENCE}"):
        validate_request(asked, None, Unread(), FACTS, DEFAULT, AnyGrammar())


def test_a_router_admits_what_outgrows_the_context() -> None:
    ids, output = [1] * (2 * CONTEXT), [2] * CONTEXT
    asked = message(
        compression=STREAMING, resume_output_ids=output, stopping=pb.Stopping(max_tokens=9 * CONTEXT)
    )
    asked.token_ids.ids[:] = ids
    request = validate_request(asked, None, Letters(), FACTS, DEFAULT, AnyGrammar())
    assert (len(request.prompt_ids), request.max_tokens) == (2 * CONTEXT, 9 * CONTEXT)
