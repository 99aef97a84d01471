"""The router's books of one attached pipeline."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.requests import ValidatedRequest
from pyramidserve.errors import ConfigurationError, RequestTooLargeError
from pyramidserve.types import PipelineState, StageState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.compression.policies import plan
from workers.kv.footprint import ShardLayout
from workers.kv.forecast import Forecast, Growth, growth


class PipelineLedger(Forecast):
    """Pages of a pipeline's stages, and what sequences take of them until the head confirms their end.

    Attributes:
        max_sequences: the most that it runs at once.
        memory: what the head last reported of each stage; empty until it does.
    """

    def __init__(self, pipeline_id: str, stages: Sequence[StageState], max_sequences: int) -> None:
        """Opens empty books.

        Raises:
            ConfigurationError: the stages do not follow each other from layer 0 on, or a size is
                not positive.
        """
        super().__init__([stage.pages_total for stage in stages], max(max_sequences, 0))
        self.pipeline_id, self.max_sequences = pipeline_id, max_sequences
        self.memory: Sequence[pb.StageMemory] = ()
        self._stages = tuple(stages)
        self._layouts = tuple(ShardLayout(s.first_layer, s.end_layer, s.page_bytes) for s in stages)
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

    def growth(self, request: ValidatedRequest, expected_tokens: int) -> Growth:
        """Pages per stage that ``request`` takes, and will until ``expected_tokens`` or its last token."""
        return growth(
            plan(request.compression, len(request.prompt_ids), self._stages[-1].end_layer),
            self._layouts,
            expected_tokens,
            request.max_tokens,
        )

    @property
    def free(self) -> tuple[int, ...]:
        """Pages per stage that its sequences will not take together."""
        return tuple(total - peak for total, peak in zip(self.pages, self.peak(), strict=True))

    def too_large(self, request: ValidatedRequest) -> RequestTooLargeError | None:
        """Why this pipeline could never hold ``request``; None if it could."""
        more = self.growth(request, request.max_tokens)
        if self.could_ever_hold(more):
            return None
        needs = more.most
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
            replace(stage, pages_reserved=min(peak, stage.pages_total))
            for stage, peak in zip(self._stages, self.peak(), strict=True)
        ]
        for rank, memory in enumerate(self.memory[: len(stages)]):
            stages[rank] = replace(
                stages[rank],
                pages_in_use=memory.pages_in_use,
                host_bytes=memory.host_bytes,
                resident_bytes=memory.resident_bytes,
            )
        return PipelineState(self.pipeline_id, tuple(stages), len(self), self.max_sequences)
