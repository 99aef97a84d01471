"""The router's books of one attached pipeline."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from cluster.admit.request import ValidatedRequest
from cluster.admit.tuning import AdmitTuning
from pyramidserve.errors import ConfigurationError, InvalidRequestError, RequestTooLargeError
from pyramidserve.types import PipelineState, StageState
from pyramidserve.v1 import pipeline_pb2 as pb
from workers.budget.footprint import ShardLayout, host_pages, stage_layout
from workers.budget.forecast import Forecast, Growth, growth
from workers.budget.kv_format import KV_FORMATS
from workers.budget.plan import KeepPlan
from workers.policies.registry import plan


class PipelineLedger(Forecast):
    """Pages of a pipeline's stages, and what sequences take of them until the head confirms their end.

    Behind the pages of all stages' devices come those of their hosts, where a sequence may need room for
    what it must not lose.

    Attributes:
        max_sequences: the most that it runs at once.
        memory: what the head last reported of each stage; empty until it does.
    """

    def __init__(
        self,
        pipeline_id: str,
        stages: Sequence[StageState],
        max_sequences: int,
        tuning: AdmitTuning = AdmitTuning(),
    ) -> None:
        """Opens empty books.

        Raises:
            ConfigurationError: the stages do not follow each other from layer 0 on, or a size is
                not positive.
        """
        ends = [0, *(stage.end_layer for stage in stages)]
        if not (
            pipeline_id
            and stages
            and max_sequences > 0
            and all(s.first_layer == end < s.end_layer for s, end in zip(stages, ends, strict=False))
            and all(stage.pages_total > 0 and stage.page_bytes > 0 for stage in stages)
            and all(s.kv_dtype in KV_FORMATS and s.host_kv_dtype in ("", *KV_FORMATS) for s in stages)
        ):
            known = [(s.pages_total, *vars(stage_layout(s)).values()) for s in stages]
            raise ConfigurationError(
                f"pipeline {pipeline_id!r} for {max_sequences} sequences has the stages {known}; they must "
                f"cover the layers in order and have pages, and KV in {', '.join(KV_FORMATS)}"
            )
        self._stages, self._layouts = tuple(stages), tuple(map(stage_layout, stages))
        hosts = zip(stages, self._layouts, strict=True)
        on_host = [stage.host_bytes_limit // layout.host_page_bytes for stage, layout in hosts]
        pages = [*(stage.pages_total for stage in stages), *on_host]
        super().__init__(pages, max_sequences, tuning.horizon)
        self.pipeline_id, self.max_sequences = pipeline_id, max_sequences
        self.memory: Sequence[pb.StageMemory] = ()

    def growth(self, request: ValidatedRequest, expected_tokens: int) -> Growth:
        """Pages that ``request`` takes, and will until ``expected_tokens`` or its last token."""
        keep = plan(request.compression, len(request.prompt_ids), self._stages[-1].end_layer)
        return _growth(keep, self._layouts, expected_tokens, request.max_tokens)

    @property
    def room(self) -> float:
        """The part of the device memory, of the stage with the least, that is promised to nobody."""
        stages = len(self._stages)
        return float((1 - self.promised[:stages] / self.pages[:stages]).min())

    @property
    def free(self) -> tuple[int, ...]:
        """Pages of each stage's device that its sequences will not take together."""
        pairs = zip(self.pages, self.peak(), strict=True)
        return tuple(total - peak for total, peak in itertools.islice(pairs, len(self._stages)))

    def share(self, pages: Sequence[float]) -> float:
        """The part that ``pages`` take of the device memory of the stage where they take most."""
        return max(pages[rank] / stage.pages_total for rank, stage in enumerate(self._stages))

    def too_large(self, request: ValidatedRequest) -> RequestTooLargeError | None:
        """Why this pipeline could never hold ``request``; None if it could."""
        more = self.growth(request, request.max_tokens)
        if self.could_ever_hold(more):
            return None
        needs, stages = more.most, len(self._stages)
        for rank in range(stages):
            need, there = needs[stages + rank], self.pages[stages + rank]
            if need > there:
                return RequestTooLargeError(
                    f"recall {request.compression.recall!r} needs {need} pages of host memory of stage "
                    f"{rank} of pipeline {self.pipeline_id}, which has {there}; lower max_tokens (now "
                    f"{request.max_tokens}), shorten the prompt or ask for recall 'off'"
                )
        rank = max(range(stages), key=lambda each: needs[each] / self.pages[each])
        stage = self._stages[rank]
        return RequestTooLargeError(
            f"the request needs {needs[rank]} pages of stage {rank} (layers {stage.first_layer} to "
            f"{stage.end_layer - 1}) of pipeline {self.pipeline_id}, which has {stage.pages_total}; "
            f"lower max_tokens (now {request.max_tokens}) or kv_keep, or shorten the prompt of "
            f"{len(request.prompt_ids)} tokens"
        )

    def take(self, memory: Sequence[pb.StageMemory]) -> None:
        """Takes in what the head reports of each stage.

        Raises:
            InvalidRequestError: it cannot be true.
        """
        if len(memory) != len(self._stages):
            raise InvalidRequestError(
                f"pipeline {self.pipeline_id!r} has {len(self._stages)} stages and reports the memory of "
                f"{len(memory)}"
            )
        for rank, (stage, told) in enumerate(zip(self._stages, memory, strict=True)):
            if not 0 <= told.pages_in_use <= stage.pages_total or told.host_bytes < 0:
                raise InvalidRequestError(
                    f"stage {rank} of pipeline {self.pipeline_id!r} reports {told.pages_in_use} of "
                    f"{stage.pages_total} pages and {told.host_bytes} bytes of host memory in use"
                )
        self.memory = memory

    def state(self) -> PipelineState:
        """The books, with the memory that the head last reported."""
        stages = [
            replace(stage, pages_reserved=min(peak, stage.pages_total))
            for stage, peak in zip(self._stages, self.peak(), strict=False)
        ]
        for rank, memory in enumerate(self.memory[: len(stages)]):
            stages[rank] = replace(
                stages[rank],
                pages_in_use=memory.pages_in_use,
                host_bytes=memory.host_bytes,
                resident_bytes=memory.resident_bytes,
                device_bytes=memory.device_bytes,
                device_peak_bytes=memory.device_peak_bytes,
            )
        return PipelineState(self.pipeline_id, tuple(stages), len(self), self.max_sequences)


@lru_cache(maxsize=1 << 14)
def _growth(plan: KeepPlan, layouts: tuple[ShardLayout, ...], expected: int, most: int) -> Growth:
    """How a sequence grows on the devices of all stages, with what it needs of their hosts behind that."""
    more = growth(plan, layouts, expected, most)
    on_host = tuple(host_pages(plan, layout, most) for layout in layouts)
    return replace(
        more, first=more.first + on_host, expected=more.expected + on_host, most=more.most + on_host
    )
