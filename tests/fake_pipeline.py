"""A pipeline without a model: the tokens are whatever a test wants them to be."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from pyramidserve.types import Compression, LayerReceipt, Sampling, Stopping
from workers.budget.footprint import ShardLayout
from workers.budget.released import ReleasedSequence
from workers.engine.pipeline import Outcome
from workers.schedule.memory import PipelineLayout
from workers.schedule.sequence import SequenceRequest
from workers.schedule.step import PrefillTrace, ShardMemory, Step, StepKind, TopLogits
from workers.schedule.tuning import ScheduleTuning

LAYERS_PER_SHARD = 2
PAGES = 64


def layout(
    shards: int = 1,
    max_sequences: int = 8,
    max_prefill_tokens: int = 10,
    host_pages: int = PAGES,
    max_sessions: int = 4,
    tuning: ScheduleTuning = ScheduleTuning(),
) -> PipelineLayout:
    bounds = range(0, LAYERS_PER_SHARD * shards, LAYERS_PER_SHARD)
    return PipelineLayout(
        shards=tuple(ShardLayout(first, first + LAYERS_PER_SHARD, 4096) for first in bounds),
        pages=(PAGES,) * shards,
        host_pages=(host_pages,) * shards,
        layers=LAYERS_PER_SHARD * shards,
        max_sequences=max_sequences,
        max_sessions=max_sessions,
        max_prefill_tokens=max_prefill_tokens,
        tuning=tuning,
    )


def request(
    sequence: int,
    prompt_tokens: int = 3,
    max_tokens: int = 4,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    forced: tuple[int, ...] = (),
    trace: bool = False,
) -> SequenceRequest:
    return SequenceRequest(
        sequence=sequence,
        request_id=f"request {sequence}",
        prompt_ids=tuple(1000 * sequence + index for index in range(prompt_tokens)),
        sampling=Sampling(seed=7),
        stopping=Stopping(max_tokens, stop, ignore_eos),
        compression=Compression(),
        forced_output_ids=forced,
        trace=trace,
    )


def decode(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes; others say nothing."""
    return bytes(each for each in ids if each < 256).decode("utf-8", "replace")


class Spoken:
    """A vocabulary whose ids say what a function makes of them; special ones have texts of their own."""

    def __init__(
        self,
        text: Callable[[Sequence[int]], str] = decode,
        special: Mapping[int, str] | None = None,
    ) -> None:
        self._text, self._special = text, special or {}

    def decode(self, ids: Sequence[int]) -> str:
        return self._text([each for each in ids if each not in self._special])

    def decode_special(self, token: int) -> str:
        return self._special.get(token, "")


def released(shard: int) -> ReleasedSequence:
    """What ``shard`` reports of a sequence; no two numbers are the same."""
    first = LAYERS_PER_SHARD * shard
    layers = tuple(LayerReceipt(layer, 1, 2, 3, 4, 5) for layer in range(first, first + LAYERS_PER_SHARD))
    return ReleasedSequence(layers, 9, 2, 100 + shard, 30, 40, 50, 60, 80, 70, 90)


class FakePipeline:
    """Hands steps back in order; ``script`` says which id a sequence gets at an output index.

    ``traces`` and ``top_logits`` are what prefills report.
    """

    def __init__(
        self, script: Callable[[int, int], int] = lambda sequence, index: 65, shards: int = 1
    ) -> None:
        self.script = script
        self.shards = shards
        self.submitted: list[tuple[Step, list[int]]] = []
        self.under_way: deque[Step] = deque()
        self.traces: tuple[PrefillTrace, ...] = ()
        self.top_logits: tuple[TopLogits, ...] = ()

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self.submitted.append((step, tokens.tolist()))
        self.under_way.append(step)

    def collect(self) -> Outcome:
        step = self.under_way.popleft()
        step = replace(step, memory=(ShardMemory(step.number, 0, 0),) * self.shards)
        if step.kind is StepKind.RELEASE:
            reports = [(released(shard),) * len(step.sequences) for shard in range(self.shards)]
            return replace(step, released=tuple(reports)), ()
        if step.kind is StepKind.PREFILL:
            step = replace(step, traces=self.traces, top_logits=self.top_logits)
        if step.kind in (StepKind.SUSPEND, StepKind.RESUME):
            return step, ()
        rows = zip(step.sequences, step.output_indices, step.forced, strict=True)
        return step, tuple(
            self.script(sequence, index) if forced < 0 else forced for sequence, index, forced in rows
        )
