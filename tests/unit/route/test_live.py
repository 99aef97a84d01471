"""One request, however many streams follow it."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from fake_head import PATIENCE, finished, request

from cluster.route.live import Follower, LiveRequest
from cluster.route.pacer import Pacer, Untold
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import EngineError, RequestConflictError, UnavailableError
from pyramidserve.types import Event, Receipt, Started, Tokens
from pyramidserve.wire import receipt_from_message

STARTED = Started(prompt_tokens=1, seed=7)
RECEIPT = receipt_from_message(finished(1).receipt)

Result = TypeVar("Result")


def run(scenario: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE))


async def collect(follower: Follower) -> list[Event]:
    return [event async for event in follower]


async def gathered(follower: Follower) -> list[Event]:
    """What a follower has to say without waiting for more than ``Started`` and one Tokens."""
    return [await anext(follower), await anext(follower)]


class AtOnce(Pacer):
    """Tells of everything without waiting."""

    def __init__(self) -> None:
        super().__init__(lambda: 0, lambda: 0.0, lambda delay, callback: None, RouteTuning())

    def add(self, untold: Untold) -> None:
        untold.tell()


class Abandoned(list[LiveRequest]):
    """The requests that were abandoned, and one that has output."""

    def live(self, resumed: tuple[int, ...] = (), pacer: Pacer | None = None) -> LiveRequest:
        wanted = request(resume_output_ids=resumed)
        return LiveRequest(wanted, "", 0.0, math.inf, self.append, pacer or AtOnce())


def test_what_is_due_when_a_follower_begins_comes_before_it_says_so() -> None:
    async def scenario() -> list[str]:
        said: list[str] = []
        follower = Abandoned().live().follow(())
        asyncio.get_running_loop().call_soon(said.append, "ordered")
        assert await anext(follower) == STARTED
        return [*said, "started"]

    assert run(scenario()) == ["ordered", "started"]


def test_a_follower_brings_what_is_there_then_what_comes() -> None:
    live = Abandoned().live()

    async def scenario() -> list[Event]:
        live.append(Tokens(0, (5,), "a"), 1.0)
        live.append(Tokens(1, (6, 7), "b"), 2.0)
        follower = live.follow(())
        events = await gathered(follower)
        rest = asyncio.create_task(collect(follower))
        live.append(Tokens(3, (8,), "c"), 3.0)
        live.finish(RECEIPT, "p")
        return events + await rest

    events = run(scenario())
    assert events[:3] == [STARTED, Tokens(0, (5, 6, 7), "ab"), Tokens(3, (8,), "c")]
    assert isinstance(events[3], Receipt)
    assert len(events) == 4


def test_a_waiting_follower_is_woken_by_the_end() -> None:
    live = Abandoned().live()

    async def scenario() -> list[Event]:
        follower = live.follow(())
        waiting = asyncio.create_task(collect(follower))
        await asyncio.sleep(0)
        live.finish(RECEIPT, "p")
        return await waiting

    assert [type(event) for event in run(scenario())] == [Started, Receipt]


def test_every_follower_raises_the_error_behind_the_output() -> None:
    live = Abandoned().live()

    async def scenario(follower: Follower) -> None:
        assert await gathered(follower) == [STARTED, Tokens(0, (5,), "a")]
        with pytest.raises(UnavailableError, match="lost"):
            await anext(follower)

    followers = [live.follow(()), live.follow(())]
    live.append(Tokens(0, (5,), "a"), 1.0)
    live.fail(UnavailableError("lost"))
    for follower in followers:
        run(scenario(follower))


def test_a_joining_stream_gets_what_it_lacks() -> None:
    live = Abandoned().live()
    for index in range(3):
        live.append(Tokens(index, (index,), str(index)), 1.0)
    assert run(gathered(live.follow((0, 1)))) == [STARTED, Tokens(2, (2,), "2")]
    live.finish(RECEIPT, "p")
    assert [type(event) for event in run(collect(live.follow((0, 1, 2))))] == [Started, Receipt]


def test_a_resumed_request_goes_on_behind_what_the_client_had() -> None:
    live = Abandoned().live(resumed=(3, 4))
    live.append(Tokens(2, (5,), "a"), 1.0)
    assert run(gathered(live.follow((3, 4)))) == [STARTED, Tokens(2, (5,), "a")]
    with pytest.raises(RequestConflictError, match="0 resume_output_ids"):
        live.follow(())


@pytest.mark.parametrize("resumed", [(9,), (5, 6), (5, 6, 7, 8)])
def test_output_that_no_stream_brought_cannot_be_resumed(resumed: tuple[int, ...]) -> None:
    live = Abandoned().live()
    live.append(Tokens(0, (5,), "a"), 1.0)
    live.append(Tokens(1, (6, 7), "b"), 1.0)
    with pytest.raises(RequestConflictError, match=f"{len(resumed)} resume_output_ids"):
        live.follow(resumed)
    assert live.followers == 0


@pytest.mark.parametrize("tokens", [Tokens(2, (5,), ""), Tokens(0, (5,), ""), Tokens(1, (5,) * 16, "")])
def test_output_with_a_gap_or_beyond_the_end_is_refused(tokens: Tokens) -> None:
    live = Abandoned().live()
    live.append(Tokens(0, (5,), "a"), 1.0)
    with pytest.raises(EngineError, match="where 1 was due"):
        live.append(tokens, 2.0)


def test_the_last_follower_to_leave_abandons_the_request() -> None:
    abandoned = Abandoned()
    live = abandoned.live()
    first, second = live.follow(()), live.follow(())
    first.close()
    first.close()
    assert abandoned == []
    second.close()
    assert abandoned == [live]


def test_leaving_after_the_end_abandons_nothing() -> None:
    abandoned = Abandoned()
    live = abandoned.live()
    follower = live.follow(())
    live.finish(RECEIPT, "p")
    follower.close()
    assert abandoned == []
    assert live.followers == 0


def test_the_receipt_has_the_times_seen_here() -> None:
    live = Abandoned().live()
    live.sent = 2.0
    live.append(Tokens(0, (5,), "a"), 5.0)
    live.append(Tokens(1, (6, 7), "b"), 6.0)
    live.append(Tokens(3, (8,), "c"), 9.0)
    live.finish(RECEIPT, "p")
    *_, receipt = run(collect(live.follow(())))
    assert isinstance(receipt, Receipt)
    assert (receipt.queue_time, receipt.time_to_first_token, receipt.pipeline_id) == (2.0, 5.0, "p")
    # The gaps are 1, 0 and 3 seconds.
    assert (receipt.inter_token_p50, receipt.inter_token_p99) == (1.0, 3.0)


def test_a_reply_of_one_token_has_no_times_between_tokens() -> None:
    live = Abandoned().live()
    live.append(Tokens(0, (5,), "a"), 5.0)
    live.finish(RECEIPT, "p")
    *_, receipt = run(collect(live.follow(())))
    assert isinstance(receipt, Receipt)
    assert (receipt.inter_token_p50, receipt.inter_token_p99) == (0.0, 0.0)


def test_tokens_behind_the_first_are_told_together_and_the_end_at_once() -> None:
    pacer = Pacer(lambda: 1, lambda: 0.0, lambda delay, callback: None, RouteTuning())
    live = Abandoned().live(pacer=pacer)

    async def scenario() -> list[Event]:
        follower = live.follow(())
        assert await anext(follower) == STARTED
        live.append(Tokens(0, (5,), "a"), 1.0)
        events = [await anext(follower)]
        coming = asyncio.create_task(anext(follower))
        for index in (1, 2):
            live.append(Tokens(index, (5 + index,), "b"), 2.0)
            await asyncio.sleep(0)
            assert not coming.done()
        pacer.tell()
        events.append(await coming)
        live.append(Tokens(3, (9,), "c"), 3.0)
        coming = asyncio.create_task(anext(follower))
        await asyncio.sleep(0)
        assert not coming.done()
        live.finish(RECEIPT, "p")
        return [*events, await coming]

    events = run(scenario())
    assert events == [Tokens(0, (5,), "a"), Tokens(1, (6, 7), "bb"), Tokens(3, (9,), "c")]
