"""A pipeline while it is attached to the router."""

import asyncio
import logging

from cluster.admit.admission import Admitted
from cluster.admit.ledger import PipelineLedger
from cluster.admit.tuning import AdmitTuning
from cluster.route.live import LiveRequest
from pyramidserve.v1 import pipeline_pb2 as pb
from pyramidserve.wire import (
    compression_to_message,
    constraint_to_message,
    sampling_to_message,
    stage_state_from_message,
    stopping_to_message,
)
from workers.events import tell

log = logging.getLogger(__name__)


class AttachedPipeline:
    """A pipeline while its stream lives.

    Attributes:
        stages: how many it has.
        sequences: what it runs, cancelled ones included until it confirms.
        orders: what is to be sent to it, one sequence an order; None is the end.
        leaving: it is to be taken away; ``Pipelines`` sets it.
        refused: it had no room for what its ledger had room for; ``Pipelines`` sets it.
    """

    def __init__(self, hello: pb.Hello, tuning: AdmitTuning) -> None:
        """Raises ConfigurationError if the stages make no sense."""
        stages = [stage_state_from_message(stage) for stage in hello.stages]
        self.pipeline_id, self.stages = hello.pipeline_id, len(stages)
        self.ledger = PipelineLedger(hello.pipeline_id, stages, hello.max_sequences, tuning)
        self.sequences: dict[int, LiveRequest] = {}
        self.orders: asyncio.Queue[pb.RouterOrder | None] = asyncio.Queue()
        self.leaving = self.refused = False

    def start(self, admitted: Admitted[LiveRequest], queued: int, now: float) -> None:
        """Orders a request to be run from where it is, while ``queued`` go on waiting."""
        live, request = admitted.item, admitted.item.request
        live.send(self.pipeline_id, admitted.sequence_id, now)
        self.sequences[admitted.sequence_id] = live
        told = live.output_ids
        forced = max(told, list(request.given_output_ids), key=len)
        start = pb.StartSequence(
            sequence_id=admitted.sequence_id,
            expected_tokens=admitted.expected_tokens,
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            forced_output_ids=forced,
            untold_output_ids=len(forced) - len(told),
            sampling=sampling_to_message(request.sampling),
            stopping=stopping_to_message(request.stopping),
            compression=compression_to_message(request.compression),
            session_id=live.session_id,
            constraint=constraint_to_message(request.constraint),
            calls=pb.CallSyntax(**vars(request.calls)) if request.calls else None,
            instructions=[pb.Span(**vars(each)) for each in request.instructions],
        )
        self.orders.put_nowait(pb.RouterOrder(start=[start], queued=queued))
        place = {"pipeline": self.pipeline_id, "sequence": admitted.sequence_id}
        waited, done = now - live.arrived, live.output_tokens
        tell(
            log,
            logging.INFO,
            "request_admitted",
            **live.ids,
            **place,
            since_arrival=waited,
            output_tokens=done,
        )

    def tell_demand(self, demand: float) -> None:
        """Passes on how many pipelines there should be, unless it has not taken what came before."""
        if self.orders.empty():
            self.orders.put_nowait(pb.RouterOrder(demand=demand))

    def cancel(self, sequence_id: int) -> None:
        """Orders a sequence to be cancelled."""
        self.orders.put_nowait(pb.RouterOrder(cancel=[sequence_id]))

    def end_session(self, session_id: str) -> None:
        """Orders what waits for the session's next turn to be given up."""
        self.orders.put_nowait(pb.RouterOrder(end_sessions=[session_id]))
