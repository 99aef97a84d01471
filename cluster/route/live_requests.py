"""The live requests, and what becomes of them."""

import asyncio
import logging
from collections.abc import Callable, Iterator

from cluster.admit.admission import Admission
from cluster.admit.conversations import Conversations
from cluster.admit.request import ValidatedRequest
from cluster.admit.sessions import Sessions
from cluster.route.attached_pipeline import AttachedPipeline
from cluster.route.live import Follower, LiveRequest
from cluster.route.metrics import Metrics
from pyramidserve.errors import (
    EngineError,
    InvalidRequestError,
    PyramidServeError,
    RequestCancelledError,
    RequestConflictError,
    UnavailableError,
    not_finite,
    policy_failed,
)
from pyramidserve.v1 import pipeline_pb2 as pb
from pyramidserve.wire import receipt_from_message, tokens_from_message
from workers.budget.pages import IntegrityError
from workers.events import tell

log = logging.getLogger(__name__)

# Seconds until a client should try again after a pipeline was lost.
LOST_RETRY_DELAY = 1.0
# How often a request is run anew: one that brings pipelines down must not bring down all.
REPLAYS = 5


def error_facts(error: PyramidServeError) -> dict[str, str]:
    """What an event says of an error.

    What is wrong with a request may have its content in it, and is told to its client alone.
    """
    facts = {"reason": error.reason}
    return facts if isinstance(error, InvalidRequestError) else facts | {"message": error.message}


class LiveRequests:
    """Every request from its arrival to its end, and what pipelines bring of it.

    Attributes:
        idle: set while there is none.
    """

    def __init__(
        self,
        admission: Admission[LiveRequest],
        sessions: Sessions,
        conversations: Conversations,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._admission, self._sessions, self._clock = admission, sessions, clock
        self._conversations, self._metrics = conversations, metrics
        self._live: dict[tuple[str, str], LiveRequest] = {}
        self.idle = asyncio.Event()
        self.idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def get(self, tenant: str, request_id: str) -> LiveRequest | None:
        """A tenant's request, if it is live."""
        return self._live.get((tenant, request_id))

    def add(self, live: LiveRequest) -> None:
        """Takes a request in that waits."""
        self._live[live.tenant, live.request.request_id] = live
        self.idle.clear()

    def join(self, live: LiveRequest, request: ValidatedRequest) -> Follower:
        """A stream of ``live`` for ``request``, which has its id.

        Raises RequestConflictError if it asks for another reply.
        """
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
        resumed = len(request.resume_output_ids)
        tell(log, logging.INFO, "request_joined", **live.ids, resumed_tokens=resumed)
        return follower

    def leave_session(self, session_id: str) -> bool:
        """Makes all live turns of a session nobody's; returns whether there are any."""
        turns = [live for live in self if live.session_id == session_id] if session_id else []
        for live in turns:
            live.session_id = ""
        return bool(turns)

    def append(self, pipeline: AttachedPipeline, new: pb.SequenceTokens) -> None:
        """Takes in new output of a sequence."""
        live = pipeline.sequences.get(new.sequence_id)
        if live is None or live.ended:
            return
        try:
            now = self._clock()
            if live.append(tokens_from_message(new.tokens), now):
                place, waited = pipeline.pipeline_id, now - live.arrived
                tell(
                    log,
                    logging.INFO,
                    "request_first_token",
                    **live.ids,
                    pipeline=place,
                    since_arrival=waited,
                )
            pipeline.ledger.advance(new.sequence_id, live.output_tokens - 1)
        except EngineError as error:
            self.fail(live, error)
            pipeline.cancel(new.sequence_id)

    def finish(self, pipeline: AttachedPipeline, finished: pb.SequenceFinished) -> None:
        """Takes in that a sequence has ended as it should."""
        live = self._release(pipeline, finished.sequence_id)
        if live is None or live.ended:
            return
        try:
            receipt = receipt_from_message(finished.receipt)
        except EngineError as error:
            self.fail(live, error)
            return
        receipt = live.finish(receipt, pipeline.pipeline_id)
        self._forget(live)
        self._admission.count_finished(live.request, receipt.output_tokens, receipt.inter_token_p50)
        self._metrics.finished(live.tenant, receipt, self._clock() - live.arrived, live.gaps())
        turn = live.transcript()
        self._sessions.count_turn(live.session_id, turn)
        if turn and live.session_id and live.request.owner:
            self._conversations.remember(live.request.owner, turn, live.session_id)
        tell(
            log,
            logging.INFO,
            "request_finished",
            **live.ids,
            pipeline=pipeline.pipeline_id,
            reason=receipt.finish_reason.value,
            output_tokens=receipt.output_tokens,
            time_to_first_token=receipt.time_to_first_token,
            since_arrival=self._clock() - live.arrived,
            preemptions=receipt.preemptions,
            replays=receipt.replays,
        )

    def end_failed(self, pipeline: AttachedPipeline, failed: pb.SequenceFailed) -> None:
        """Takes in that a sequence has ended otherwise."""
        live = self._release(pipeline, failed.sequence_id)
        if live is None or live.ended:
            return
        if failed.cause == failed.CAUSE_NO_ROOM:
            self._admission.decisions["no_room"] += 1
            self._admission.requeue(live)
            tell(log, logging.INFO, "request_requeued", **live.ids, pipeline=pipeline.pipeline_id)
        elif failed.cause == failed.CAUSE_NOT_FINITE:
            self.fail(live, not_finite(live.request.request_id))
        elif failed.cause == failed.CAUSE_POLICY:
            self.fail(live, policy_failed(live.request.request_id, failed.detail))
        else:
            self.replay(live, pipeline)

    def replay(self, live: LiveRequest, pipeline: AttachedPipeline) -> None:
        """Queues what a lost pipeline ran; it goes on behind the output that there is."""
        if live.ended:
            return
        live.losses += 1
        request_id = live.request.request_id
        if live.losses > REPLAYS:
            error = UnavailableError(
                f"request {request_id!r} lost {live.losses} pipelines, {pipeline.pipeline_id} the last; "
                "send it again with the ids received as resume_output_ids",
                retry_delay=LOST_RETRY_DELAY,
            )
            self.fail(live, error)
            return
        self._admission.decisions["replayed"] += 1
        self._admission.requeue(live)
        lost, done = pipeline.pipeline_id, live.output_tokens
        tell(log, logging.INFO, "request_replayed", **live.ids, pipeline=lost, output_tokens=done)

    def fail(self, live: LiveRequest, error: PyramidServeError) -> None:
        """Ends a request with ``error``, unless it has ended."""
        if live.ended:
            return
        live.fail(error)
        self._forget(live)
        self._admission.decisions[error.reason] += 1
        cancelled = isinstance(error, RequestCancelledError)
        if cancelled:
            self._metrics.cancelled(live.tenant)
        tell(
            log,
            logging.INFO,
            "request_cancelled" if cancelled else "request_failed",
            **live.ids,
            pipeline=live.pipeline_id,
            **error_facts(error),
            output_tokens=live.output_tokens,
            since_arrival=self._clock() - live.arrived,
        )

    def check_integrity(self, running: list[LiveRequest]) -> None:
        """Raises IntegrityError unless every live request waits or is one of those ``running``."""
        for (_, request_id), live in self._live.items():
            places = (live in self._admission) + sum(live is each for each in running)
            if live.ended or not live.followers or places != 1:
                raise IntegrityError(
                    f"{request_id!r} has {places} places, {live.followers} followers, ended: {live.ended}"
                )
        if len(self._admission) + len(running) != len(self._live):
            raise IntegrityError(
                f"{len(self._admission)} waiting + {len(running)} running requests are not "
                f"{len(self._live)} live ones"
            )
        if self.idle.is_set() == bool(self._live):
            raise IntegrityError(f"idle with {len(self._live)} live requests")

    def _release(self, pipeline: AttachedPipeline, sequence_id: int) -> LiveRequest | None:
        live = pipeline.sequences.pop(sequence_id, None)
        if live is None:
            # A sequence may end by itself while its cancellation is on the way.
            place = {"pipeline": pipeline.pipeline_id, "sequence": sequence_id}
            tell(log, logging.INFO, "unknown_sequence", **place)
        else:
            pipeline.ledger.remove(sequence_id)
        return live

    def _forget(self, live: LiveRequest) -> None:
        self._admission.remove(live)
        del self._live[live.tenant, live.request.request_id]
        if not self._live:
            self.idle.set()
