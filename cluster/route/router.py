"""Ties queue, ledgers, sessions and live requests together."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping

from cluster.admit.admission import Admission
from cluster.admit.ledger import PipelineLedger
from cluster.admit.placement import Placement
from cluster.admit.request import ValidatedRequest
from cluster.admit.sessions import Sessions
from cluster.route.live import Follower, LiveRequest
from cluster.route.live_requests import LOST_RETRY_DELAY, Registry
from cluster.route.pacer import Pacer
from cluster.route.pipelines import AttachedPipeline
from pyramidserve.errors import (
    ConfigurationError,
    RequestCancelledError,
    RequestConflictError,
    ServerLeftError,
    UnavailableError,
)
from pyramidserve.types import ClusterState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.budget.pages import IntegrityError
from workers.model.transcript import Transcript

log = logging.getLogger(__name__)

# Seconds until a pipeline is tried again that had no room although nothing of ours ran there.
REFUSAL_PAUSE = 0.1


def _call_later(delay: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(delay, callback)


class Router:
    """Admits requests to pipelines and brings their output back.

    All methods but ``drain`` act at once; call them from one event loop.
    """

    def __init__(
        self,
        model: str,
        *,
        queue_limit: int,
        session_limit: int,
        session_max_age: float,
        weights: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], None] = _call_later,
    ) -> None:
        """A router without pipelines.

        Args:
            model: the checkpoint; pipelines that serve another are refused.
            queue_limit: the most requests that may wait, >= 1.
            session_limit: the most sessions that are remembered.
            session_max_age: seconds that a session is remembered after its last use.
            weights: shares of the tenants; one that is not there has 1.
            clock: monotonic seconds.
            call_later: calls back after a delay in seconds.
        """
        self.model = model
        self._clock = clock
        self._call_later = call_later
        self._admission: Admission[LiveRequest] = Admission(queue_limit, weights or {}, clock)
        self._sessions = Sessions(session_limit, session_max_age, clock)
        self._live = Registry(self._admission, self._sessions, clock)
        self._pipelines: dict[str, AttachedPipeline] = {}
        self._placement = Placement()
        self._pacer = Pacer(lambda: len(self._live) - len(self._admission), clock, call_later)
        self._draining = False

    @property
    def serving(self) -> bool:
        """Whether a pipeline is attached."""
        return bool(self._pipelines)

    def submit(
        self, request: ValidatedRequest, tenant: str = "", seconds_left: float = math.inf
    ) -> Follower:
        """Queues ``request``, or joins it if it is live; close the follower in any case.

        Args:
            tenant: who asks.
            seconds_left: when the client gives up.

        Raises:
            RequestConflictError: the id is live with other content.
            RequestTooLargeError: no attached pipeline could ever hold it.
            OverloadedError: the queue is full.
            RequestTimeoutError: it could not end in time.
            ServerLeftError: the router is draining.
        """
        live = self._live.get(tenant, request.request_id)
        if live is not None:
            return self._join(live, request)
        self._refuse_when_draining()
        now = self._clock()
        live = LiveRequest(request, tenant, now, now + seconds_left, self._cancel, self._pacer)
        self._admission.enqueue(live, self._ledgers())
        follower = live.follow(request.resume_output_ids)
        self._live.add(live)
        log.info("request_queued request_id=%r", request.request_id)
        self._dispatch()
        return follower

    def end_session(self, session_id: str) -> int:
        """Forgets a session, here and on all pipelines, and returns its turns.

        Raises UnknownSessionError.
        """
        turns = self._sessions.end(session_id)
        for pipeline in self._pipelines.values():
            pipeline.end_session(session_id)
        return turns

    def last_turn(self, session_id: str) -> Transcript | None:
        """The last turn of a session, if it is known."""
        return self._sessions.last_turn(session_id)

    def attach(self, hello: pb.Hello) -> AttachedPipeline:
        """Takes a pipeline in, in place of one of the same id; ``detach`` it in any case.

        Raises:
            ConfigurationError: it serves another model, or its stages make no sense.
            ServerLeftError: the router is draining.
        """
        self._refuse_when_draining()
        if hello.model != self.model:
            raise ConfigurationError(
                f"pipeline {hello.pipeline_id!r} serves {hello.model!r} and this router "
                f"{self.model!r}; start it with the router's checkpoint"
            )
        pipeline = AttachedPipeline(hello)
        if hello.pipeline_id in self._pipelines:
            self.detach(self._pipelines[hello.pipeline_id])
        self._pipelines[hello.pipeline_id] = pipeline
        self._placement.gained(pipeline.ledger)
        log.info("pipeline_attached pipeline_id=%r stages=%d", hello.pipeline_id, len(hello.stages))
        self._refuse_too_large()
        self._dispatch()
        return pipeline

    def detach(self, pipeline: AttachedPipeline) -> None:
        """Lets a pipeline go and queues what it ran to be replayed; harmless twice."""
        if self._pipelines.get(pipeline.pipeline_id) is not pipeline:
            return
        del self._pipelines[pipeline.pipeline_id]
        self._placement.close(pipeline.pipeline_id)
        pipeline.orders.put_nowait(None)
        log.info(
            "pipeline_detached pipeline_id=%r sequences=%d",
            pipeline.pipeline_id,
            len(pipeline.sequences),
        )
        for live in pipeline.sequences.values():
            self._live.replay(live, pipeline)
        self._refuse_too_large()
        self._dispatch()

    def report(self, pipeline: AttachedPipeline, step: pb.StepReport) -> None:
        """Takes in what a step of a pipeline brought; nothing if it is detached.

        Raises InvalidRequestError if it says of its memory what cannot be true.
        """
        if self._pipelines.get(pipeline.pipeline_id) is not pipeline:
            return
        if step.memory:
            pipeline.ledger.take(step.memory)
        for new in step.tokens:
            self._live.append(pipeline, new)
        self._pacer.tell()
        for finished in step.finished:
            self._live.finish(pipeline, finished)
        for failed in step.failed:
            self._live.end_failed(pipeline, failed)
        if step.finished or step.failed:
            refused = any(each.cause == each.CAUSE_NO_ROOM for each in step.failed)
            freed = step.finished or any(each.cause != each.CAUSE_NO_ROOM for each in step.failed)
            pipeline.refused = refused and not freed
            self._gained(pipeline)
            if pipeline.refused and not pipeline.sequences:
                self._call_later(REFUSAL_PAUSE, lambda: self._try_again(pipeline))
            self._dispatch()
            self._let_go(pipeline)

    def leave(self, pipeline: AttachedPipeline) -> None:
        """Lets a pipeline go as soon as what it runs has ended; it gets nothing new."""
        log.info(
            "pipeline_leaving pipeline_id=%r sequences=%d", pipeline.pipeline_id, len(pipeline.sequences)
        )
        pipeline.leaving = True
        self._placement.close(pipeline.pipeline_id)
        self._let_go(pipeline)

    def demand(self) -> float:
        """How many pipelines the requests would fill that run or wait here; 0 without pipelines."""
        staying = [each.ledger for each in self._pipelines.values() if not each.leaving]
        return self._admission.demand(staying)

    def tell_demand(self) -> None:
        """Tells all pipelines how much there is to do, for the autoscaler."""
        demand = self.demand()
        for pipeline in self._pipelines.values():
            pipeline.tell_demand(demand)

    def state(self) -> ClusterState:
        """A snapshot."""
        return ClusterState(
            model=self.model,
            queued=len(self._admission),
            running=sum(len(each.sequences) for each in self._pipelines.values()),
            queue_limit=self._admission.limit,
            sessions=len(self._sessions),
            pipelines=tuple(ledger.state() for ledger in self._ledgers()),
            decisions=dict(self._admission.decisions),
        )

    async def drain(self, timeout: float) -> None:
        """Refuses new requests, waits ``timeout`` seconds for the live ones, then lets all go."""
        self._draining = True
        for pipeline in self._pipelines.values():
            self._gained(pipeline)
        self._dispatch()
        if self._live:
            try:
                await asyncio.wait_for(self._live.idle.wait(), timeout)
            except TimeoutError:
                log.warning("drain_timed_out live=%d", len(self._live))
        for pipeline in list(self._pipelines.values()):
            self.detach(pipeline)
        for live in self._live:
            error = UnavailableError("the router has shut down", retry_delay=LOST_RETRY_DELAY)
            self._live.fail(live, error)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every live request is in one place and the books balance."""
        running = []
        for pipeline in self._pipelines.values():
            if len(pipeline.ledger) != len(pipeline.sequences):
                raise IntegrityError(f"{pipeline.pipeline_id} runs what its ledger does not hold")
            running += [live for live in pipeline.sequences.values() if not live.ended]
        self._live.check_integrity(running)

    def _ledgers(self) -> list[PipelineLedger]:
        return [pipeline.ledger for pipeline in self._pipelines.values()]

    def _refuse_when_draining(self) -> None:
        if self._draining:
            self._admission.decisions[ServerLeftError.reason] += 1
            raise ServerLeftError("the router is shutting down", retry_delay=LOST_RETRY_DELAY)

    def _join(self, live: LiveRequest, request: ValidatedRequest) -> Follower:
        decisions = self._admission.decisions
        try:
            if not request.same_reply(live.request):
                raise RequestConflictError(
                    f"request_id {request.request_id!r} is running with other content; "
                    "send the same content to join it, or another request_id"
                )
            follower = live.follow(request.resume_output_ids)
        except RequestConflictError as error:
            decisions[error.reason] += 1
            raise
        decisions["joined"] += 1
        return follower

    def _dispatch(self) -> None:
        for live, error in self._admission.take_too_late():
            self._live.fail(live, error)
        for admitted in self._admission.choose(self._placement, self._sessions):
            live, request = admitted.item, admitted.item.request
            if not live.losses:
                live.sent = self._clock()
            live.pipeline_id = admitted.pipeline_id
            if request.session_id:
                self._sessions.place(request.session_id, admitted.pipeline_id)
            self._pipelines[admitted.pipeline_id].start(admitted, len(self._admission))
            log.info(
                "request_admitted request_id=%r sequence_id=%d pipeline_id=%r",
                request.request_id,
                admitted.sequence_id,
                admitted.pipeline_id,
            )

    def _gained(self, pipeline: AttachedPipeline) -> None:
        """Something has ended on a pipeline, or it may be given requests again."""
        # When all is shut down, pipelines that leave have to do what waits.
        if pipeline.refused or (pipeline.leaving and not self._draining):
            self._placement.close(pipeline.pipeline_id)
        else:
            self._placement.gained(pipeline.ledger)

    def _let_go(self, pipeline: AttachedPipeline) -> None:
        waiting = self._draining and len(self._admission)
        if pipeline.leaving and not pipeline.sequences and not waiting:
            pipeline.orders.put_nowait(None)

    def _refuse_too_large(self) -> None:
        for live, error in self._admission.take_too_large(self._ledgers()):
            self._live.fail(live, error)

    def _try_again(self, pipeline: AttachedPipeline) -> None:
        pipeline.refused = False
        if self._pipelines.get(pipeline.pipeline_id) is pipeline:
            self._gained(pipeline)
        self._dispatch()

    def _cancel(self, live: LiveRequest) -> None:
        """Ends a request that nobody follows; its pages stay promised until the head confirms."""
        if pipeline := self._pipelines.get(live.pipeline_id):
            for sequence_id, running in pipeline.sequences.items():
                if running is live:
                    pipeline.cancel(sequence_id)
        self._live.fail(live, RequestCancelledError("nobody follows the request"))
        self._dispatch()
