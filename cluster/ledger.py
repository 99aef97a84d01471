"""The router's books of one attached pipeline."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.requests import ValidatedRequest
from pyramidserve.errors import ConfigurationError, RequestTooLargeError
from pyramidserve.types import PipelineState, StageState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.compression.policies import plan
from workers.kv.footprint import ShardLayout, peak_pages
from workers.kv.ledger import Ledger


class PipelineLedger(Ledger):
    """Pages of a pipeline's stages, and those promised to its sequences until the head confirms their end.

    Attributes:
        memory: what the head last reported of each stage; empty until it does.
    """

    def __init__(self, pipeline_id: str, stages: Sequence[StageState], max_sequences: int) -> None:
        """Opens empty books.

        Raises:
            ConfigurationError: the stages do not follow each other from layer 0 on, or a size is
                not positive.
        """
        super().__init__([stage.pages_total for stage in stages], max_sequences)
        self.pipeline_id = pipeline_id
        self.memory: Sequence[pb.StageMemory] = ()
        self._stages = tuple(stages)
        ends = [0, *(stage.end_layer for stage in stages)]
        if not (
            pipeline_id
            and stages
            and max_sequences > 0
            and all(s.first_layer == end < s.end_layer for s, end in zip(stages, ends, strict=False))
            and all(stage.pages_total > 0 and stage.page_bytes > 0 for stage in stages)
        ):
            raise ConfigurationError(
                f"pipeline {pipeline_id!r} for {max_sequences} sequences has the stages "
                f"{[(s.first_layer, s.end_layer, s.pages_total, s.page_bytes) for s in stages]}; "
                "they must cover the layers in order and have pages"
            )

    def needs(self, request: ValidatedRequest) -> tuple[int, ...]:
        """Pages per stage that ``request`` takes at its peak."""
        keep = plan(request.compression, len(request.prompt_ids), self._stages[-1].end_layer)
        return tuple(
            peak_pages(
                keep,
                ShardLayout(stage.first_layer, stage.end_layer, stage.page_bytes),
                request.max_tokens,
            )
            for stage in self._stages
        )

    def too_large(self, request: ValidatedRequest) -> RequestTooLargeError | None:
        """Why this pipeline could never hold ``request``; None if it could."""
        needs = self.needs(request)
        if self.could_ever_hold(needs):
            return None
        rank = max(range(len(needs)), key=lambda each: needs[each] / self.pages[each])
        stage = self._stages[rank]
        return RequestTooLargeError(
            f"the request needs {needs[rank]} pages of stage {rank} (layers {stage.first_layer} to "
            f"{stage.end_layer - 1}) of pipeline {self.pipeline_id}, which has {stage.pages_total}; "
            f"lower max_tokens (now {request.max_tokens}) or kv_keep, or shorten the prompt of "
            f"{len(request.prompt_ids)} tokens"
        )

    def state(self) -> PipelineState:
        """The books, with the memory that the head last reported."""
        stages = [
            replace(stage, pages_reserved=stage.pages_total - free)
            for stage, free in zip(self._stages, self.free, strict=True)
        ]
        for rank, memory in enumerate(self.memory[: len(stages)]):
            stages[rank] = replace(
                stages[rank],
                pages_in_use=memory.pages_in_use,
                host_bytes=memory.host_bytes,
                resident_bytes=memory.resident_bytes,
            )
        return PipelineState(self.pipeline_id, tuple(stages), len(self), self.max_sequences)
