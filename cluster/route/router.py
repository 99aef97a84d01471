"""Ties queue, ledgers, sessions and live requests together."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from cluster.admit.admission import Admission, too_large
from cluster.admit.conversations import Conversations
from cluster.admit.request import ValidatedRequest
from cluster.admit.sessions import Sessions
from cluster.admit.tuning import AdmitTuning
from cluster.route.attached_pipeline import AttachedPipeline
from cluster.route.live import Follower, LiveRequest
from cluster.route.live_requests import LOST_RETRY_DELAY, LiveRequests
from cluster.route.metrics import Metrics
from cluster.route.pacer import Pacer
from cluster.route.pipelines import Pipelines
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import (
    RequestCancelledError,
    ServerLeftError,
    UnavailableError,
)
from pyramidserve.types import ChatMessage, ClusterState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.events import tell
from workers.model.transcript import Transcript
from workers.policies.registry import policy_name, versions
from workers.schedule.validation import lowered

log = logging.getLogger(__name__)


def _call_later(delay: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(delay, callback)


class Router:
    """Admits requests to pipelines and brings their output back.

    All methods but ``drain`` act at once; call them from one event loop.

    Attributes:
        metrics: what Prometheus is told.
        kv_dtype: in what the pipeline that was attached last stores KV; "" before the first.
    """

    def __init__(
        self,
        model: str,
        *,
        queue_limit: int,
        session_limit: int,
        session_max_age: float,
        weights: Mapping[str, float] | None = None,
        policies: Mapping[str, str] | None = None,
        admit: AdmitTuning = AdmitTuning(),
        route: RouteTuning = RouteTuning(),
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
            policies: versions by name, which pipelines must have too; None: those that come with this.
            admit, route: of admission, and of the router itself.
            clock: monotonic seconds.
            call_later: calls back after a delay in seconds.
        """
        self.model, self.kv_dtype = model, ""
        self._clock = clock
        self._admission: Admission[LiveRequest] = Admission(queue_limit, weights or {}, clock, admit)
        self._sessions = Sessions(session_limit, session_max_age, clock)
        self._conversations = Conversations(session_limit)
        self.metrics = Metrics()
        self.metrics.watch(self.state)
        self._live = LiveRequests(self._admission, self._sessions, self._conversations, self.metrics, clock)
        self._pipelines = Pipelines(model, policies or versions(), admit, route, call_later, self._dispatch)
        self._pacer = Pacer(lambda: len(self._live) - len(self._admission), clock, call_later, route)

    @property
    def serving(self) -> bool:
        """Whether a pipeline is attached."""
        return len(self._pipelines) > 0

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
            OverloadedError: the queue is full, and its tenant has its share of it.
            RequestTimeoutError: it could not end in time.
            ServerLeftError: the router is draining.
        """
        live = self._live.get(tenant, request.request_id)
        if live is not None:
            return self._live.join(live, request)
        self._refuse_when_draining()
        if not request.limited:
            request = lowered(request, lambda less: not too_large(less, self._pipelines.ledgers()))
        now = self._clock()
        live = LiveRequest(request, tenant, now, now + seconds_left, self._cancel, self._pacer)
        self._admission.enqueue(live, self._pipelines.ledgers())
        follower = live.follow(request.resume_output_ids)
        self._live.add(live)
        tell(
            log,
            logging.INFO,
            "request_queued",
            **live.ids,
            prompt_tokens=len(request.prompt_ids),
            resumed_tokens=len(request.resume_output_ids),
            max_tokens=request.max_tokens,
            policy=policy_name(request.compression),
            waiting=len(self._admission),
        )
        self._dispatch()
        return follower

    def end_session(self, session_id: str) -> int:
        """Forgets a session, here and on all pipelines, and returns its turns.

        Turns of it that wait or run go on, and leave nothing. Raises UnknownSessionError.
        """
        begun = self._live.leave_session(session_id)
        turns = self._sessions.end(session_id, begun)
        for pipeline in self._pipelines:
            pipeline.end_session(session_id)
        return turns

    def last_turn(self, session_id: str) -> Transcript | None:
        """The last turn of a session, if it is known."""
        return self._sessions.last_turn(session_id)

    def conversation(self, owner: str, messages: Sequence[ChatMessage]) -> str:
        """The session of ``owner`` that ``messages`` go on from, unless a turn of it is live; "": none."""
        live = {each.session_id for each in self._live}

        def usable(session_id: str) -> bool:
            return session_id not in live and self._sessions.last_turn(session_id) is not None

        return self._conversations.find(owner, messages, usable)

    def attach(self, hello: pb.Hello) -> AttachedPipeline:
        """Takes a pipeline in, in place of one of the same id; ``detach`` it in any case.

        Raises:
            ConfigurationError: it serves another model, or its stages make no sense.
            ServerLeftError: the router is draining.
        """
        self._refuse_when_draining()
        pipeline = self._pipelines.introduced(hello)
        if predecessor := self._pipelines.get(hello.pipeline_id):
            self.detach(predecessor)
        self._pipelines.add(pipeline)
        self.kv_dtype = hello.stages[0].kv_dtype
        self._place_anew()
        return pipeline

    def detach(self, pipeline: AttachedPipeline) -> None:
        """Lets a pipeline go and queues what it ran to be replayed; harmless twice."""
        if pipeline not in self._pipelines:
            return
        self._pipelines.remove(pipeline)
        for live in pipeline.sequences.values():
            self._live.replay(live, pipeline)
        self._place_anew()

    def report(self, pipeline: AttachedPipeline, step: pb.StepReport) -> None:
        """Takes in what a step of a pipeline brought; nothing if it is detached.

        Raises InvalidRequestError if it says of its memory what cannot be true.
        """
        if pipeline not in self._pipelines:
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
            self._pipelines.take_ends(pipeline, step)
            self._dispatch()
            self._pipelines.let_go(pipeline, len(self._admission))

    def leave(self, pipeline: AttachedPipeline) -> None:
        """Lets a pipeline go as soon as what it runs has ended; it gets nothing new."""
        self._pipelines.leave(pipeline, len(self._admission))

    def demand(self) -> float:
        """How many pipelines the requests would fill that run or wait here; 0 without pipelines."""
        return self._admission.demand(self._pipelines.staying())

    def tell_demand(self) -> None:
        """Tells all pipelines how much there is to do, for the autoscaler."""
        demand = self.demand()
        for pipeline in self._pipelines:
            pipeline.tell_demand(demand)

    def state(self) -> ClusterState:
        """A snapshot."""
        return ClusterState(
            model=self.model,
            queued=len(self._admission),
            running=sum(len(each.sequences) for each in self._pipelines),
            queue_limit=self._admission.limit,
            sessions=len(self._sessions),
            pipelines=tuple(ledger.state() for ledger in self._pipelines.ledgers()),
            decisions=dict(self._admission.decisions),
        )

    async def drain(self, timeout: float) -> None:
        """Refuses new requests, waits ``timeout`` seconds for the live ones, then lets all go."""
        self._pipelines.drain()
        self._dispatch()
        if self._live:
            try:
                await asyncio.wait_for(self._live.idle.wait(), timeout)
            except TimeoutError:
                tell(log, logging.WARNING, "drain_timed_out", live=len(self._live))
        for pipeline in self._pipelines:
            self.detach(pipeline)
        for live in self._live:
            error = UnavailableError("the router has shut down", retry_delay=LOST_RETRY_DELAY)
            self._live.fail(live, error)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every live request is in one place and the books balance."""
        self._live.check_integrity(self._pipelines.running())

    def _refuse_when_draining(self) -> None:
        if self._pipelines.draining:
            self._admission.decisions[ServerLeftError.reason] += 1
            raise ServerLeftError("the router is shutting down", retry_delay=LOST_RETRY_DELAY)

    def _place_anew(self) -> None:
        """Looks through the queue once the pipelines are others."""
        for live, error in self._admission.take_too_large(self._pipelines.ledgers()):
            self._live.fail(live, error)
        self._dispatch()

    def _dispatch(self) -> None:
        for live, error in self._admission.take_too_late():
            self._live.fail(live, error)
        for admitted in self._admission.choose(self._pipelines.placement, self._sessions):
            if session_id := admitted.item.session_id:
                self._sessions.place(session_id, admitted.pipeline_id)
            pipeline = self._pipelines[admitted.pipeline_id]
            pipeline.start(admitted, len(self._admission), self._clock())

    def _cancel(self, live: LiveRequest) -> None:
        """Ends a request that nobody follows; its pages stay promised until the head confirms."""
        pipeline = self._pipelines.get(live.pipeline_id)
        if pipeline and live.sequence_id in pipeline.sequences:
            pipeline.cancel(live.sequence_id)
        self._live.fail(live, RequestCancelledError("nobody follows the request"))
        self._dispatch()
