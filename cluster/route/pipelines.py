"""The pipelines that are attached, and which of them are given requests."""

import logging
from collections.abc import Callable, Iterator, Mapping

from cluster.admit.ledger import PipelineLedger
from cluster.admit.placement import Placement
from cluster.admit.tuning import AdmitTuning
from cluster.route.attached_pipeline import AttachedPipeline
from cluster.route.live import LiveRequest
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import ConfigurationError
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.budget.pages import IntegrityError
from workers.events import tell
from workers.policies.registry import skew

log = logging.getLogger(__name__)


class Pipelines:
    """Every pipeline from its Hello until it is let go.

    One that is leaving gets nothing new, and neither does one that has refused what its ledger had room
    for, until something ends there or a pause is over.

    Attributes:
        placement: those that are given requests.
        draining: all is shut down, so that those that are leaving have to do what waits.
    """

    def __init__(
        self,
        model: str,
        policies: Mapping[str, str],
        admit: AdmitTuning,
        route: RouteTuning,
        call_later: Callable[[float, Callable[[], None]], None],
        tried_again: Callable[[], None],
    ) -> None:
        """No pipelines.

        Args:
            model: the checkpoint that all serve.
            policies: the versions that all have, by name.
            admit: of their books and of the placement.
            route: says how long those that have refused pause.
            call_later: calls back after a delay in seconds.
            tried_again: called when the pause of one that refused is over.
        """
        self.placement = Placement(admit)
        self.draining = False
        self._model, self._policies, self._admit = model, policies, admit
        self._refusal_pause = route.refusal_pause
        self._call_later, self._tried_again = call_later, tried_again
        self._attached: dict[str, AttachedPipeline] = {}

    def __len__(self) -> int:
        return len(self._attached)

    def __iter__(self) -> Iterator[AttachedPipeline]:
        return iter(list(self._attached.values()))

    def __contains__(self, pipeline: AttachedPipeline) -> bool:
        """Whether it is attached, and not another of the same id in its place."""
        return self._attached.get(pipeline.pipeline_id) is pipeline

    def __getitem__(self, pipeline_id: str) -> AttachedPipeline:
        return self._attached[pipeline_id]

    def get(self, pipeline_id: str) -> AttachedPipeline | None:
        """The pipeline of that id, if one is attached."""
        return self._attached.get(pipeline_id)

    def ledgers(self) -> list[PipelineLedger]:
        """The books of all."""
        return [pipeline.ledger for pipeline in self]

    def staying(self) -> list[PipelineLedger]:
        """The books of those that are not leaving."""
        return [pipeline.ledger for pipeline in self if not pipeline.leaving]

    def introduced(self, hello: pb.Hello) -> AttachedPipeline:
        """A pipeline that is still to be added.

        Raises ConfigurationError if model or policies are others, or its stages make no sense.
        """
        if hello.model != self._model:
            raise ConfigurationError(
                f"pipeline {hello.pipeline_id!r} serves {hello.model!r} and this router "
                f"{self._model!r}; start it with the router's checkpoint"
            )
        if differing := skew(self._policies, hello.policies):
            raise ConfigurationError(
                f"pipeline {hello.pipeline_id!r} cannot be served by this router, which has {differing}; "
                "install the same packages on all nodes"
            )
        return AttachedPipeline(hello, self._admit)

    def add(self, pipeline: AttachedPipeline) -> None:
        """Takes a pipeline in, of whose id there is none."""
        self._attached[pipeline.pipeline_id] = pipeline
        self.placement.gained(pipeline.ledger)
        tell(log, logging.INFO, "pipeline_attached", pipeline=pipeline.pipeline_id, shards=pipeline.stages)

    def remove(self, pipeline: AttachedPipeline) -> None:
        """Lets an attached pipeline go, whatever it runs."""
        del self._attached[pipeline.pipeline_id]
        self.placement.close(pipeline.pipeline_id)
        pipeline.orders.put_nowait(None)
        name, sequences = pipeline.pipeline_id, len(pipeline.sequences)
        tell(log, logging.INFO, "pipeline_detached", pipeline=name, sequences=sequences)

    def leave(self, pipeline: AttachedPipeline, waiting: int) -> None:
        """Gives a pipeline nothing new, and lets it go as soon as it may; nothing if it is not attached.

        ``waiting``: see ``let_go``.
        """
        if pipeline not in self:
            return
        name, sequences = pipeline.pipeline_id, len(pipeline.sequences)
        tell(log, logging.INFO, "pipeline_leaving", pipeline=name, sequences=sequences)
        pipeline.leaving = True
        self.placement.close(pipeline.pipeline_id)
        self.let_go(pipeline, waiting)

    def take_ends(self, pipeline: AttachedPipeline, step: pb.StepReport) -> None:
        """Takes in that sequences have ended on a pipeline, or were refused there."""
        refused = any(each.cause == each.CAUSE_NO_ROOM for each in step.failed)
        freed = step.finished or any(each.cause != each.CAUSE_NO_ROOM for each in step.failed)
        pipeline.refused = refused and not freed
        self._gained(pipeline)
        if pipeline.refused and not pipeline.sequences:
            self._call_later(self._refusal_pause, lambda: self._try_again(pipeline))

    def let_go(self, pipeline: AttachedPipeline, waiting: int) -> None:
        """Lets a pipeline go if it is leaving and has nothing to do.

        Args:
            waiting: requests in the queue, which it has to do too when all is shut down.
        """
        if pipeline.leaving and not pipeline.sequences and not (self.draining and waiting):
            pipeline.orders.put_nowait(None)

    def drain(self) -> None:
        """Gives requests to those that are leaving too, from now on."""
        self.draining = True
        for pipeline in self:
            self._gained(pipeline)

    def running(self) -> list[LiveRequest]:
        """What runs on them and has not ended. Raises IntegrityError if a ledger does not hold it."""
        for pipeline in self:
            if len(pipeline.ledger) != len(pipeline.sequences):
                raise IntegrityError(f"{pipeline.pipeline_id} runs what its ledger does not hold")
        return [live for pipeline in self for live in pipeline.sequences.values() if not live.ended]

    def _gained(self, pipeline: AttachedPipeline) -> None:
        """Something has ended on a pipeline, or it may be given requests again."""
        if pipeline.refused or (pipeline.leaving and not self.draining):
            self.placement.close(pipeline.pipeline_id)
        else:
            self.placement.gained(pipeline.ledger)

    def _try_again(self, pipeline: AttachedPipeline) -> None:
        pipeline.refused = False
        if pipeline in self:
            self._gained(pipeline)
        self._tried_again()
