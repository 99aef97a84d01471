"""The router, without gRPC."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_head import PATIENCE, cancelled, failed, finished, hello, request, tokens
from fuzz import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.admit.request import ValidatedRequest
from cluster.admit.tuning import AdmitTuning
from cluster.route.attached_pipeline import AttachedPipeline
from cluster.route.live import Follower
from cluster.route.live_requests import REPLAYS
from cluster.route.router import Router
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import (
    ConfigurationError,
    EngineError,
    OverloadedError,
    PyramidServeError,
    RequestConflictError,
    RequestTooLargeError,
    UnavailableError,
    UnknownSessionError,
)
from pyramidserve.types import Event, Receipt, Started, Stopping, Tokens
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.budget.span import Span

NO_ROOM = pb.SequenceFailed.CAUSE_NO_ROOM
CANCELLED, UNKNOWN = pb.SequenceFailed.CAUSE_CANCELLED, pb.SequenceFailed.CAUSE_UNSPECIFIED


class Bench:
    """A router whose clock and timers a test moves."""

    def __init__(
        self,
        queue_limit: int = 4,
        admit: AdmitTuning = AdmitTuning(),
        route: RouteTuning = RouteTuning(),
    ) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.router = Router(
            "toy",
            queue_limit=queue_limit,
            session_limit=8,
            session_max_age=60,
            admit=admit,
            route=route,
            clock=lambda: self.now,
            call_later=lambda delay, callback: self.timers.append((delay, callback)),
        )

    def submit(self, request_id: str = "r", pages: int = 1, **options: Any) -> Follower:
        return self.router.submit(request(request_id, pages, **options))

    def report(self, pipeline: AttachedPipeline, **parts: Any) -> None:
        self.router.report(pipeline, pb.StepReport(**parts))
        self.router.check_integrity()

    def fire_timers(self) -> None:
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()

    def running(self) -> int:
        return self.router.state().running

    def queued(self) -> int:
        return self.router.state().queued

    def assert_empty(self) -> None:
        self.router.check_integrity()
        state = self.router.state()
        assert (state.queued, state.running) == (0, 0)
        for pipeline in state.pipelines:
            assert pipeline.sequences == 0
            assert [stage.pages_reserved for stage in pipeline.stages] == [0] * len(pipeline.stages)


def orders(pipeline: AttachedPipeline) -> tuple[list[tuple[int, str]], list[int], bool]:
    """Takes what a pipeline is due: sequences to start, sequences to cancel, and whether it is the end."""
    start: list[tuple[int, str]] = []
    cancel: list[int] = []
    while not pipeline.orders.empty():
        order = pipeline.orders.get_nowait()
        if order is None:
            return start, cancel, True
        start += [(each.sequence_id, each.request_id) for each in order.start]
        cancel += order.cancel
    return start, cancel, False


def events(follower: Follower) -> list[Event]:
    """All events of a reply that has ended; raises what it ended with."""

    async def collect() -> list[Event]:
        return [event async for event in follower]

    return asyncio.run(asyncio.wait_for(collect(), PATIENCE))


def end_of(follower: Follower) -> PyramidServeError:
    with pytest.raises(PyramidServeError) as raised:
        events(follower)
    return raised.value


def test_a_request_runs_from_the_queue_to_its_receipt() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    follower = bench.submit("r", 2, session_id="s")
    assert orders(pipeline) == ([(1, "r")], [], False)
    assert bench.router.state().pipelines[0].stages[1].pages_reserved == 2
    bench.now = 1.0
    bench.report(pipeline, tokens=[tokens(1, 0, 5)], memory=[pb.StageMemory(pages_in_use=1)] * 2)
    assert bench.router.state().pipelines[0].stages[0].pages_in_use == 1
    bench.report(pipeline, tokens=[tokens(1, 1, 6)], finished=[finished(1, "r", 2)])
    started, output, receipt = events(follower)
    assert started == Started(17, 7)
    assert output == Tokens(0, (5, 6), " 5 6")
    assert isinstance(receipt, Receipt)
    assert (receipt.pipeline_id, receipt.time_to_first_token, receipt.output_tokens) == ("p", 1.0, 2)
    bench.assert_empty()
    assert bench.router.end_session("s") == 1
    with pytest.raises(UnknownSessionError):
        bench.router.end_session("s")
    assert bench.router.state().decisions == {"admitted": 1, "finished": 1}


def test_a_session_that_ends_while_turns_wait_and_run_is_nobodys() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello(pages=(1, 1)))
    runs, waits = bench.submit("runs", session_id="s"), bench.submit("waits", session_id="s")
    assert bench.router.end_session("s") == 0
    with pytest.raises(UnknownSessionError):
        bench.router.end_session("s")
    assert orders(pipeline) == ([(1, "runs")], [], False)
    bench.report(pipeline, tokens=[tokens(1, 0, 5)], finished=[finished(1, "runs", 1)])
    order = pipeline.orders.get_nowait()
    assert order is not None
    (start,) = order.start
    assert (start.request_id, start.session_id) == ("waits", "")
    again = bench.submit("waits", session_id="s")  # the same request, whatever became of its session
    bench.report(pipeline, tokens=[tokens(2, 0, 5)], finished=[finished(2, "waits", 1)])
    assert all(isinstance(events(each)[-1], Receipt) for each in (runs, waits, again))
    assert bench.router.state().sessions == 0
    bench.assert_empty()


def test_a_session_whose_only_turn_waits_can_be_ended() -> None:
    bench = Bench()
    bench.submit("waits", session_id="s")
    assert bench.router.end_session("s") == 0
    with pytest.raises(UnknownSessionError):
        bench.router.end_session("s")
    with pytest.raises(UnknownSessionError):
        bench.router.end_session("")


def test_an_order_carries_all_that_the_head_needs() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.submit("r", 2, resume_output_ids=(4, 5))
    order = pipeline.orders.get_nowait()
    assert order is not None
    (start,) = order.start
    assert (start.sequence_id, start.request_id, list(start.prompt_ids)) == (1, "r", [1] * 17)
    assert list(start.forced_output_ids) == [4, 5]
    assert (start.sampling.seed, start.stopping.max_tokens, start.compression.policy) == (7, 16, "full")
    assert start.expected_tokens == 16


def test_an_order_says_which_tokens_are_instructions() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.router.submit(replace(request("r", 2), instructions=(Span(0, 5), Span(9, 11))))
    order = pipeline.orders.get_nowait()
    assert order is not None
    assert [(each.first, each.end) for each in order.start[0].instructions] == [(0, 5), (9, 11)]
    with pytest.raises(RequestConflictError, match="'r'"):
        bench.router.submit(request("r", 2))


def test_orders_say_how_many_go_on_waiting() -> None:
    bench = Bench()
    for name in "abc":
        bench.submit(name, 5)
    pipeline = bench.router.attach(hello(pages=(8,)))
    order = pipeline.orders.get_nowait()
    assert order is not None
    assert (len(order.start), order.queued) == (1, 2)


@pytest.mark.parametrize(("admit", "running"), [(AdmitTuning(), 2), (AdmitTuning(lookahead=0), 1)])
def test_requests_are_admitted_as_the_router_is_tuned(admit: AdmitTuning, running: int) -> None:
    bench = Bench(admit=admit)
    bench.router.attach(hello())
    for name, pages in (("a", 5), ("b", 5), ("c", 1)):
        bench.submit(name, pages)
    assert bench.running() == running


def test_requests_wait_for_a_pipeline() -> None:
    bench = Bench()
    follower = bench.submit("a")
    assert bench.queued() == 1
    bench.now = 3.0
    pipeline = bench.router.attach(hello())
    assert orders(pipeline)[0] == [(1, "a")]
    bench.report(pipeline, finished=[finished(1)])
    *_, receipt = events(follower)
    assert isinstance(receipt, Receipt)
    assert receipt.queue_time == 3.0


def test_what_waited_and_is_too_large_fails_when_a_pipeline_attaches() -> None:
    bench = Bench()
    large, small = bench.submit("large", 9), bench.submit("small", 8)
    bench.router.attach(hello())
    assert isinstance(end_of(large), RequestTooLargeError)
    assert bench.running() == 1
    small.close()
    bench.router.check_integrity()


def test_what_only_a_lost_pipeline_could_hold_fails() -> None:
    bench = Bench()
    bench.router.attach(hello("small", (4,)))
    large = bench.router.attach(hello("large", (9,)))
    first, second = bench.submit("first", 9), bench.submit("second", 9)
    bench.router.detach(large)
    assert isinstance(end_of(first), RequestTooLargeError)
    assert isinstance(end_of(second), RequestTooLargeError)
    bench.assert_empty()


def test_too_large_is_refused_at_once() -> None:
    bench = Bench()
    bench.router.attach(hello())
    with pytest.raises(RequestTooLargeError, match="needs 9 pages of stage 0"):
        bench.submit("r", 9)
    bench.assert_empty()


def test_a_full_queue_refuses_with_a_delay() -> None:
    bench = Bench(queue_limit=1)
    follower = bench.submit("a")
    with pytest.raises(OverloadedError) as refused:
        bench.submit("b")
    assert refused.value.retry_delay == 1.0
    follower.close()
    bench.assert_empty()


def test_a_live_request_is_joined_not_run_twice() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    first = bench.submit("r")
    bench.report(pipeline, tokens=[tokens(1, 0, 5)])
    second = bench.submit("r", resume_output_ids=(5,), seed=99, seed_given=False)
    assert bench.running() == 1
    first.close()
    assert orders(pipeline)[1] == []
    bench.report(pipeline, tokens=[tokens(1, 1, 6)], finished=[finished(1)])
    assert events(second)[:2] == [Started(1, 7), Tokens(1, (6,), " 6")]
    bench.assert_empty()


@pytest.mark.parametrize("other", [request("r", 2), request("r", seed=8), request("r", session_id="s")])
def test_other_content_under_a_live_id_is_a_conflict(other: ValidatedRequest) -> None:
    bench = Bench()
    follower = bench.submit("r")
    with pytest.raises(RequestConflictError, match="'r'"):
        bench.router.submit(other)
    bench.router.check_integrity()
    follower.close()
    bench.assert_empty()


def test_cancelled_pages_are_free_only_when_the_head_confirms() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    follower = bench.submit("a", 8)
    waiting = bench.submit("b", 8)
    follower.close()
    assert orders(pipeline) == ([(1, "a")], [1], False)
    assert bench.router.state().pipelines[0].stages[0].pages_reserved == 8
    bench.report(pipeline, tokens=[tokens(1, 0, 5)])
    assert bench.queued() == 1
    bench.report(pipeline, failed=[cancelled(1)])
    assert orders(pipeline)[0] == [(2, "b")]
    waiting.close()
    bench.report(pipeline, failed=[cancelled(2)])
    bench.assert_empty()


def test_a_cancelled_id_can_be_used_again_at_once() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.submit("r").close()
    follower = bench.submit("r")
    bench.report(pipeline, failed=[failed(1, NO_ROOM)])
    assert orders(pipeline)[0] == [(1, "r"), (2, "r")]
    bench.report(pipeline, finished=[finished(2)])
    assert len(events(follower)) == 2
    bench.assert_empty()


def test_a_sequence_may_end_while_its_cancellation_is_on_the_way() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.submit("r").close()
    bench.report(pipeline, finished=[finished(1)])
    bench.report(pipeline, failed=[cancelled(1)])
    bench.assert_empty()
    assert bench.router.state().decisions == {"admitted": 1, "cancelled": 1}


def test_leaving_the_queue_lets_the_next_one_in() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.submit("a", 4)
    first = bench.submit("b", 8)
    bench.now = AdmitTuning().patience + 1
    bench.submit("c", 4)
    assert bench.queued() == 2
    first.close()
    assert [request_id for _, request_id in orders(pipeline)[0]] == ["a", "c"]
    bench.router.check_integrity()


def test_what_a_head_has_no_room_for_waits_in_front() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    for name in "abc":
        bench.now += 1
        bench.submit(name, 4)
    bench.report(pipeline, failed=[failed(2, NO_ROOM)])
    assert bench.queued() == 2
    bench.report(pipeline, finished=[finished(1)])
    assert [request_id for _, request_id in orders(pipeline)[0]] == ["a", "b", "b", "c"]
    decisions = bench.router.state().decisions
    assert (decisions["no_room"], decisions["requeued"]) == (1, 1)


def test_what_is_refused_together_keeps_its_order() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    for name in "ab":
        bench.submit(name, 4)
    bench.report(pipeline, failed=[failed(1, NO_ROOM), failed(2, NO_ROOM)])
    bench.fire_timers()
    assert [request_id for _, request_id in orders(pipeline)[0]] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("pause", [RouteTuning().refusal_pause, 3.0])
def test_an_empty_pipeline_that_has_no_room_is_tried_again_later(pause: float) -> None:
    bench = Bench(route=RouteTuning(refusal_pause=pause))
    pipeline = bench.router.attach(hello())
    bench.submit("a")
    bench.report(pipeline, failed=[failed(1, NO_ROOM)])
    assert (bench.queued(), bench.running()) == (1, 0)
    assert [delay for delay, _ in bench.timers] == [pause]
    bench.fire_timers()
    assert (bench.queued(), bench.running()) == (0, 1)


def test_output_out_of_order_fails_the_request_and_cancels_the_sequence() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    follower = bench.submit("r")
    bench.report(pipeline, tokens=[tokens(1, 3, 5)])
    assert isinstance(end_of(follower), EngineError)
    assert orders(pipeline)[1] == [1]
    bench.report(pipeline, failed=[cancelled(1)])
    bench.assert_empty()


def test_a_receipt_that_makes_no_sense_is_an_engine_error() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    follower = bench.submit("r")
    bench.report(pipeline, finished=[pb.SequenceFinished(sequence_id=1)])
    assert isinstance(end_of(follower), EngineError)
    bench.assert_empty()


def test_the_requests_of_a_lost_pipeline_go_on_behind_their_output() -> None:
    bench = Bench()
    lost = bench.router.attach(hello("lost"))
    followers = [bench.submit("a"), bench.submit("b", resume_output_ids=(4,))]
    bench.submit("c").close()
    bench.report(lost, tokens=[tokens(1, 0, 5, 6), tokens(2, 1, 7)])
    bench.now = 1.0
    bench.router.detach(lost)
    bench.router.detach(lost)
    assert orders(lost)[2]
    assert not bench.router.serving
    assert (bench.queued(), bench.running()) == (2, 0)
    bench.router.check_integrity()
    bench.report(lost, tokens=[tokens(1, 2, 9)], finished=[finished(2)])  # nobody listens any more
    bench.now = 2.0
    other = bench.router.attach(hello("other"))
    order = [other.orders.get_nowait() for _ in range(2)]
    starts = [start for each in order if each for start in each.start]
    assert [(s.sequence_id, s.request_id, list(s.forced_output_ids)) for s in starts] == [
        (4, "a", [5, 6]),
        (5, "b", [4, 7]),
    ]
    bench.report(other, tokens=[tokens(4, 2, 8)], finished=[finished(4, "a", 3), finished(5, "b", 2)])
    for follower, expected in zip(followers, [(5, 6, 8), (7,)], strict=True):
        _, output, receipt = events(follower)
        assert isinstance(output, Tokens)
        assert output.token_ids == expected
        assert isinstance(receipt, Receipt)
        assert (receipt.pipeline_id, receipt.queue_time) == ("other", 0.0)
    assert bench.router.state().decisions["replayed"] == 2
    bench.assert_empty()


def test_what_was_lost_comes_before_what_arrived_later() -> None:
    bench = Bench()
    lost = bench.router.attach(hello("lost", pages=(8,)))
    bench.submit("a", 8)
    bench.now = 1.0
    bench.submit("b", 8)
    bench.router.detach(lost)
    assert orders(bench.router.attach(hello("other", pages=(8,))))[0] == [(2, "a")]


def test_a_request_that_loses_every_pipeline_fails_with_a_delay() -> None:
    bench = Bench()
    follower = bench.submit("a")
    for number in range(REPLAYS + 1):
        bench.router.check_integrity()
        bench.router.detach(bench.router.attach(hello(f"p{number}")))
    error = end_of(follower)
    assert isinstance(error, UnavailableError)
    assert error.retry_delay is not None
    assert f"lost {REPLAYS + 1} pipelines, p{REPLAYS} the last" in error.message
    bench.assert_empty()


@pytest.mark.parametrize("cause", [CANCELLED, UNKNOWN])
def test_what_a_head_gives_up_by_itself_is_replayed(cause: pb.SequenceFailed.Cause.ValueType) -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.submit("a")
    bench.report(pipeline, failed=[failed(1, cause)])
    assert orders(pipeline)[0] == [(1, "a"), (2, "a")]
    assert bench.router.state().decisions["replayed"] == 1


def test_what_is_not_finite_fails_and_is_counted() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    follower, other = bench.submit("a"), bench.submit("b")
    bench.report(pipeline, failed=[failed(1, pb.SequenceFailed.CAUSE_NOT_FINITE)])
    error = end_of(follower)
    assert isinstance(error, EngineError)
    assert (error.reason, "'a'" in error.message) == ("not_finite", True)
    assert bench.router.state().decisions["not_finite"] == 1
    bench.report(pipeline, tokens=[tokens(2, 0, 5)], finished=[finished(2, "b", 1)])
    assert isinstance(events(other)[-1], Receipt)
    bench.assert_empty()


def test_a_length_that_nobody_has_asked_for_is_what_a_pipeline_has_room_for() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello(pages=(8,)))
    whole = replace(request("a"), stopping=Stopping(max_tokens=10_000))
    with pytest.raises(RequestTooLargeError):
        bench.router.submit(whole)
    bench.router.submit(replace(whole, limited=False))
    order = pipeline.orders.get_nowait()
    assert order is not None
    (start,) = order.start
    most = start.stopping.max_tokens
    bench.router.submit(replace(whole, request_id="b", stopping=Stopping(max_tokens=most)))
    with pytest.raises(RequestTooLargeError):
        bench.router.submit(replace(whole, request_id="c", stopping=Stopping(max_tokens=most + 1)))


def test_a_pipeline_that_attaches_again_takes_its_own_place() -> None:
    bench = Bench()
    old = bench.router.attach(hello())
    follower = bench.submit("a")
    new = bench.router.attach(hello())
    bench.router.detach(old)
    assert bench.router.serving
    assert orders(new)[0] == [(2, "a")]
    bench.report(new, finished=[finished(2)])
    assert isinstance(events(follower)[-1], Receipt)


def test_a_session_stays_where_it_is() -> None:
    bench = Bench()
    home = bench.router.attach(hello("home"))
    bench.submit("a", session_id="s")
    other = bench.router.attach(hello("other", pages=(99, 99)))
    bench.submit("b", session_id="s")
    bench.submit("c")
    assert [name for _, name in orders(home)[0]] == ["a", "b"]
    assert [name for _, name in orders(other)[0]] == ["c"]
    assert bench.router.state().sessions == 1


def test_a_pipeline_of_another_model_is_refused() -> None:
    bench = Bench()
    with pytest.raises(ConfigurationError, match="'other' and this router 'toy'"):
        bench.router.attach(hello(model="other"))
    assert not bench.router.serving


def test_a_pipeline_with_another_version_of_a_policy_is_refused() -> None:
    bench, skewed = Bench(), hello()
    skewed.policies["pyramid"] = "0"
    with pytest.raises(ConfigurationError, match="policy 'pyramid' in version 2 here and 0 there"):
        bench.router.attach(skewed)
    assert not bench.router.serving


def test_draining_lets_what_runs_end_and_takes_nothing_new() -> None:
    bench = Bench()

    async def scenario() -> None:
        pipeline = bench.router.attach(hello())
        bench.submit("a")
        draining = asyncio.create_task(bench.router.drain(PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError):
            bench.submit("b")
        with pytest.raises(UnavailableError):
            bench.router.attach(hello("q"))
        bench.submit("a")
        assert not draining.done()
        bench.report(pipeline, finished=[finished(1)])
        await draining
        assert orders(pipeline)[2]

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    bench.assert_empty()
    assert not bench.router.serving


def test_draining_gives_up_in_the_end() -> None:
    bench = Bench()
    bench.router.attach(hello())
    followers = [bench.submit("running", 8), bench.submit("waiting", 8)]
    asyncio.run(bench.router.drain(0))
    for follower in followers:
        assert isinstance(end_of(follower), UnavailableError)
    bench.assert_empty()


def test_a_pipeline_that_leaves_ends_what_it_runs_and_gets_nothing_new() -> None:
    bench = Bench()
    leaving, staying = bench.router.attach(hello("leaving")), bench.router.attach(hello("staying"))
    follower = bench.submit("a")
    home, other = (leaving, staying) if not leaving.orders.empty() else (staying, leaving)
    orders(home)
    bench.router.leave(home)
    bench.submit("b")
    assert orders(home) == ([], [], False)
    assert [name for _, name in orders(other)[0]] == ["b"]
    bench.report(home, tokens=[tokens(1, 0, 5)], finished=[finished(1)])
    assert isinstance(events(follower)[-1], Receipt)
    assert orders(home) == ([], [], True)
    assert bench.router.state().decisions.get("replayed", 0) == 0


def test_an_idle_pipeline_leaves_at_once() -> None:
    bench = Bench()
    pipeline = bench.router.attach(hello())
    bench.router.leave(pipeline)
    assert orders(pipeline) == ([], [], True)


def test_a_pipeline_that_leaves_takes_nothing_from_the_one_in_its_place() -> None:
    bench = Bench()
    old, new = bench.router.attach(hello()), bench.router.attach(hello())
    bench.router.leave(old)
    bench.submit("a")
    assert orders(new) == ([(1, "a")], [], False)


def test_pipelines_that_leave_do_what_waits_when_all_is_shut_down() -> None:
    bench = Bench()

    async def scenario() -> None:
        pipeline = bench.router.attach(hello())
        first, second = bench.submit("a", 8), bench.submit("b", 8)
        bench.router.leave(pipeline)
        draining = asyncio.create_task(bench.router.drain(PATIENCE))
        await asyncio.sleep(0)
        bench.report(pipeline, finished=[finished(1)])
        assert [name for _, name in orders(pipeline)[0]] == ["a", "b"]
        bench.report(pipeline, finished=[finished(2)])
        await draining
        for follower in (first, second):
            assert isinstance([event async for event in follower][-1], Receipt)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    bench.assert_empty()


def test_the_demand_is_what_runs_and_waits_over_a_pipeline() -> None:
    bench = Bench(queue_limit=99)
    assert bench.router.demand() == 0.0
    bench.submit("early", 4)
    assert bench.router.demand() == 0.0  # nothing is known of pipelines yet
    first = bench.router.attach(hello("first"))
    assert bench.router.demand() == 0.5
    for name in "abc":
        bench.submit(name, 8)
    assert bench.router.demand() == 3.5
    second = bench.router.attach(hello("second"))
    assert bench.router.demand() == 3.5  # one of those that waited runs there
    orders(first)
    orders(second)
    bench.router.tell_demand()
    bench.router.tell_demand()  # not again while the last is on its way
    order = first.orders.get_nowait()
    assert order is not None
    assert order.demand == 3.5
    assert first.orders.empty()
    bench.router.leave(second)
    assert bench.router.demand() == 2.5  # what runs there needs no other


class RouterMachine(RuleBasedStateMachine):
    """Clients and heads that do what they may, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(queue_limit=3)
        self.followers: list[Follower] = []
        self.pipelines: list[AttachedPipeline] = []
        # What each head runs, as it knows from its orders.
        self.heads: dict[int, dict[int, int]] = {}
        self.attached = 0

    def choices(self) -> list[tuple[AttachedPipeline, int]]:
        return [(each, key) for each in self.pipelines for key in self.heads[id(each)]]

    @rule(name=st.sampled_from("abcdef"), pages=st.integers(1, 9), session_id=st.sampled_from(["", "s"]))
    def submit(self, name: str, pages: int, session_id: str) -> None:
        self.bench.now += 1
        try:
            self.followers.append(self.bench.submit(name, pages, session_id=session_id))
        except OverloadedError:
            assert self.bench.queued() >= 3
        except RequestTooLargeError:
            assert pages > 8
            assert self.pipelines
        except RequestConflictError:
            assert self.followers

    @precondition(lambda self: self.followers)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.followers.remove(follower := data.draw(st.sampled_from(self.followers)))
        follower.close()

    @precondition(lambda self: len(self.pipelines) < 2)
    @rule(max_sequences=st.integers(1, 4))
    def attach(self, max_sequences: int) -> None:
        self.attached += 1
        pipeline = self.bench.router.attach(hello(f"p{self.attached}", (8, 8), max_sequences))
        self.pipelines.append(pipeline)
        self.heads[id(pipeline)] = {}

    @precondition(lambda self: self.pipelines)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        self.pipelines.remove(pipeline := data.draw(st.sampled_from(self.pipelines)))
        self.bench.router.detach(pipeline)

    @precondition(lambda self: self.pipelines)
    @rule(data=st.data())
    def take_orders(self, data: st.DataObject) -> None:
        """The head learns what it is to run, and confirms what it is to cancel."""
        pipeline = data.draw(st.sampled_from(self.pipelines))
        head = self.heads[id(pipeline)]
        cancel = self.take_starts(pipeline)
        confirmed = [sequence_id for sequence_id in cancel if head.pop(sequence_id, None) is not None]
        self.bench.report(pipeline, failed=[cancelled(sequence_id) for sequence_id in confirmed])

    @precondition(lambda self: self.choices())
    @rule(data=st.data())
    def output(self, data: st.DataObject) -> None:
        pipeline, key = data.draw(st.sampled_from(self.choices()))
        index = self.heads[id(pipeline)][key]
        if index < 16:
            self.heads[id(pipeline)][key] += 1
            self.bench.report(pipeline, tokens=[tokens(key, index, index)])

    @precondition(lambda self: self.choices())
    @rule(data=st.data(), how=st.sampled_from(["finished", "no room", "given up"]))
    def end(self, data: st.DataObject, how: str) -> None:
        pipeline, key = data.draw(st.sampled_from(self.choices()))
        if how == "no room" and self.heads[id(pipeline)][key]:
            return
        del self.heads[id(pipeline)][key]
        if how == "finished":
            self.bench.report(pipeline, finished=[finished(key)])
        else:
            self.bench.report(pipeline, failed=[failed(key, NO_ROOM if how == "no room" else CANCELLED)])

    @rule()
    def pass_time(self) -> None:
        self.bench.fire_timers()

    @invariant()
    def books_balance(self) -> None:
        self.bench.router.check_integrity()

    def teardown(self) -> None:
        if self.pipelines:
            while self.bench.queued() or self.bench.running():
                before = self.bench.router.state()
                self.bench.fire_timers()
                for pipeline in self.pipelines:
                    self.finish_all(pipeline)
                assert self.bench.router.state() != before
        for follower in self.followers:
            follower.close()
        self.bench.assert_empty()

    def take_starts(self, pipeline: AttachedPipeline) -> list[int]:
        """The head begins what it is to start, behind the output that is forced; returns what to cancel."""
        cancel: list[int] = []
        while not pipeline.orders.empty():
            order = pipeline.orders.get_nowait()
            assert order is not None
            for start in order.start:
                assert list(start.forced_output_ids) == list(range(len(start.forced_output_ids)))
                self.heads[id(pipeline)][start.sequence_id] = len(start.forced_output_ids)
            cancel += order.cancel
        return cancel

    def finish_all(self, pipeline: AttachedPipeline) -> None:
        head = self.heads[id(pipeline)]
        self.take_starts(pipeline)
        self.bench.report(pipeline, finished=[finished(sequence_id) for sequence_id in head])
        head.clear()


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=examples(150), stateful_step_count=40)
