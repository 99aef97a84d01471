"""One shard at work: runs steps on its layers and its cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import torch

from workers.budget.footprint import ShardLayout
from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.budget.released import ReleasedSequence
from workers.device import device_memory, open_device, to_device
from workers.engine.choose import choose_backend, choose_dtype, choose_host_dtype, choose_kv_dtype
from workers.engine.settings import EngineSettings
from workers.engine.stage_memory import build_cache, check_room, shard_layout
from workers.execute.choice import Chooser
from workers.execute.decode import Decoder
from workers.execute.drawing import Drawing, draw
from workers.execute.generation import Generation
from workers.execute.prefill import Prefill
from workers.execute.prompt import FreshPrompt, Prompt, Rotate
from workers.execute.workspace import prefill_workspace_bytes, step_workspace_bytes
from workers.kv.entry import Positions
from workers.kv.link import HostLink, link_for
from workers.kv.page_table import Lengths
from workers.model.config import read_config
from workers.model.grammar import Grammars, Matching
from workers.model.llama import LlamaLayer
from workers.model.rope import Rope, Rotation
from workers.model.tokenizer import Tokenizer, end_ids
from workers.model.weights import load_stage
from workers.policies.measured import gates_of, use_gates
from workers.policies.registry import chooser, enable, plan, span_floor, versions
from workers.recall.exact import verify
from workers.recall.lifted import LiftedRows
from workers.recall.new_rows import new_rows_bytes
from workers.recall.step import BestOfHost
from workers.recall.turn import ContinuedPrompt
from workers.schedule.step import (
    VERIFIED_ROWS,
    PrefillTrace,
    SequenceSpec,
    ShardMemory,
    Step,
    StepKind,
    TopLogits,
)

TRACED_LOGITS = 8

Work = tuple[Step, torch.Tensor]


@dataclass(frozen=True)
class StageConfig:
    """How to build a shard with layers ``first`` to ``end`` of ``checkpoint``, a folder."""

    checkpoint: Path
    first: int
    end: int
    settings: EngineSettings


@dataclass(frozen=True)
class StageFacts:
    """What the rest of the cluster must know of a shard.

    ``workspace_bytes``: device memory that a step may need beside weights and KV pool. ``dtype`` is of
    weights, ``backend`` has the kernels. ``policies``: versions by name.
    """

    layout: ShardLayout
    pages: int
    host_bytes_limit: int
    workspace_bytes: int
    tensor_names: tuple[str, ...]
    pid: int
    node: str
    dtype: str
    backend: str
    policies: dict[str, str]


class Stage:
    """A shard's part of the model, cache and samplings of its sequences, on ``device``."""

    def __init__(self, config: StageConfig, link: HostLink | None = None) -> None:
        """Loads the weights. Raises CheckpointError or ConfigurationError."""
        self._settings = settings = config.settings
        self._checkpoint = config.checkpoint
        enable(settings.policies)
        use_gates(settings.gates)
        self._model_config = model = read_config(config.checkpoint, settings.max_model_len)
        self.device = device = open_device(settings.device)
        self._dtype = choose_dtype(settings.dtype, device)
        self._kv_dtype = choose_kv_dtype(settings.kv_dtype, self._dtype, model.head_size)
        self._host_dtype = choose_host_dtype(settings.host_kv_dtype, self._kv_dtype, model.head_size)
        self._backend = choose_backend(settings.backend, device, self._dtype, settings.reference)
        self.model, self.tensor_names = load_stage(
            config.checkpoint, model, config.first, config.end, self._dtype, device, self._backend
        )
        self._rope = Rope(config.checkpoint, model, device)
        stored = (self._kv_dtype, self._host_dtype)
        self._decoder = Decoder(self.model, model, self._backend, self._rope, self._kv_dtype)
        self.layout = shard_layout(model, config.first, config.end, *stored)
        check_room(settings, self.layout, device, self.workspace_bytes())
        self.cache = build_cache(
            *(settings, model, self.layout, *stored, device, link or link_for(device)), self._turn
        )
        gates = gates_of(model.fingerprint)
        layers = [cast(LlamaLayer, layer) for layer in self.model.layers]
        for number, layer in enumerate(layers, config.first):
            layer.gate = gates.of(number, device) if gates else None
        self._generation = Generation(self.cache, self.layout, [layer.gate for layer in layers])
        self._sequences: dict[int, _Sequence] = {}
        self._running: set[int] = set()
        self._process = psutil.Process()

    def facts(self, node: str) -> StageFacts:
        """What the rest of the cluster must know."""
        return StageFacts(
            layout=self.layout,
            pages=self.cache.device.pool.allocator.pages,
            host_bytes_limit=self.cache.host.limit_bytes,
            workspace_bytes=self.workspace_bytes(),
            tensor_names=self.tensor_names,
            pid=self._process.pid,
            node=node,
            dtype=str(self._dtype).removeprefix("torch."),
            backend=self._backend.name,
            policies=versions(self._settings.policies, self._model_config.fingerprint),
        )

    def workspace_bytes(self) -> int:
        """The most that a prefill and a decode between its blocks allocate together.

        A prompt as long as the context is prefilled alone.
        """
        model, settings = self._model_config, self._settings
        longest = max(settings.max_prefill_tokens, model.context)
        rows = max(settings.max_sequences, VERIFIED_ROWS)
        new_rows = 0
        if self.layout.mirrors:
            new_rows = new_rows_bytes(self.layout, min(settings.max_sequences, VERIFIED_ROWS))
        return new_rows + step_workspace_bytes(
            *(model, self._backend, longest, rows),
            *(self._dtype.itemsize, self._kv_dtype, settings.execute.block_rows),
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time has gone; see ``Stopwatch``."""
        return self._backend.stopwatch.seconds

    def run(self, step: Step, inputs: torch.Tensor) -> Work:
        """Runs any step but a prefill.

        Args:
            step: the header; ``rows`` and ``positions`` describe ``inputs``.
            inputs: token ids int64 [rows] in the first shard, else hidden states [rows, hidden].

        Returns:
            The header and tensor for the next shard; from the last, token ids int64 [sequences].

        Raises IntegrityError when the shard's books do not balance once nothing runs any more.
        """
        drafts = step.kind in (StepKind.DECODE, StepKind.VERIFY)
        for sequence, generated in zip(step.sequences, step.generated, strict=True):
            self._generation.settle(sequence, generated, drafts)
        match step.kind:
            case StepKind.RELEASE | StepKind.PARK:
                end = self._release if step.kind is StepKind.RELEASE else self._park
                released = tuple(map(end, step.sequences))
                self._running.difference_update(step.sequences)
                if not self._running:  # nobody waits for the check
                    self.cache.check_integrity()
                return self._report(replace(step, released=(*step.released, released))), inputs
            case StepKind.SUSPEND | StepKind.RESUME:
                move = self.cache.suspend if step.kind is StepKind.SUSPEND else self.cache.resume
                for sequence in step.sequences:
                    move(sequence)
                return self._report(step), inputs
            case StepKind.VERIFY:
                rows = to_device(inputs, self.device)
                return self._pass_on(step, verify(step, rows, self._decoder, self.cache, self._generation))
        return self._pass_on(step, self._decode(step, to_device(inputs, self.device)))

    def begin(self, step: Step, inputs: torch.Tensor) -> Prefill:
        """Begins a prefill; ``inputs`` as for ``run``, and given away."""
        positions, rows = step.positions, step.rows
        plans = [plan(new.compression, new.prompt_tokens, self._model_config.layers) for new in step.new]
        rotation = self._rope.rotation(_places(step, plans), step.rows_and_lengths)
        hidden = self.model.embed(to_device(inputs, self.device))
        prompts: list[Prompt] = []
        for spec, keep, count, length in zip(step.new, plans, step.rows, step.lengths, strict=True):
            floor = span_floor(spec.compression)
            choose = Chooser(spec.sequence, chooser(spec.compression), spec.instructions, floor)
            # Lifted rows and the past may be as many as the whole prompt.
            most = min(spec.prompt_tokens, self._model_config.context) if spec.continues else count
            workspace = self._workspace(keep, most)
            self._sequences[spec.sequence] = _Sequence(self._drawing(spec), workspace, spec.trace)
            self._running.add(spec.sequence)
            if spec.continues:  # alone in its step
                del self._sequences[spec.continues]
                self._generation.reopen(spec.continues, spec.sequence, keep, spec.reused, choose, length)
                past = int((positions < spec.reused).sum())
                lifted = LiftedRows(positions[:past], hidden[:past].clone())
                prompts.append(
                    ContinuedPrompt(
                        *(
                            spec.sequence,
                            self._generation,
                            self.cache,
                            self.model,
                            self.layout.first,
                            lifted,
                        ),
                        *(spec.recall, choose, self._rotate(length), self._settings.execute.block_rows),
                        self._backend.stopwatch,
                    )
                )
                positions, hidden, rows = positions[past:], hidden[past:], (count - past,)
                rotation = (rotation[0][past:], rotation[1][past:])
            else:
                self._generation.open(spec.sequence, keep, choose, length)
                prompts.append(
                    FreshPrompt(
                        *(spec.sequence, keep, self.cache, self.model, self.layout.first, choose),
                        *(self._rotate(length), self._backend.stopwatch),
                    )
                )
        return Prefill(
            *(step, prompts, rows, positions, hidden, rotation),
            *(self.model, self._backend, self._settings.execute.block_rows),
        )

    def _drawing(self, spec: SequenceSpec) -> Drawing:
        held = spec.constraint is not None and self.model.head is not None
        return Drawing(
            spec, Matching(self._grammars, spec.constraint) if held and spec.constraint else None
        )

    @cached_property
    def _grammars(self) -> Grammars:
        tokenizer = Tokenizer(self._checkpoint)
        return Grammars(tokenizer, self._model_config.vocabulary, end_ids(self._model_config, tokenizer))

    def _rotate(self, length: int) -> Rotate:
        """Rotations of positions in a sequence of at most so many tokens."""

        def rotate(positions: Positions) -> Rotation:
            return self._rope.rotation(positions, [(len(positions), length)])

        return rotate

    def _turn(self, keys: torch.Tensor, layers: Lengths, distances: Lengths, length: int) -> torch.Tensor:
        """See ``Turn``; layers that rotate nothing have nothing to rotate anew."""
        rotates = np.array([layer.rotates for layer in self.model.layers])
        return self._rope.turned(keys, distances * rotates[layers], length)

    def finish(self, prefill: Prefill) -> Work:
        """Ends a prefill all of whose blocks are done; returns as ``run``."""
        step = replace(prefill.step, rows=prefill.rows, positions=prefill.positions)
        step = replace(step, traces=(*step.traces, *self._traces(step)))
        return self._pass_on(step, prefill.hidden)

    def _pass_on(self, step: Step, hidden: torch.Tensor) -> Work:
        failed = ((key, self._generation.failure(key)) for key in dict.fromkeys(step.sequences))
        step = replace(step, failed=(*step.failed, *((key, why) for key, why in failed if why)))
        if self.model.head is not None:
            step, hidden = self._sample(step, hidden)
        return self._report(step), hidden

    def _decode(self, step: Step, inputs: torch.Tensor) -> torch.Tensor:
        fed = step.fed
        targets = self._generation.targets(fed)
        tail = targets.tail if targets else 0
        paged = self.cache.extend(fed)
        recalls = any(sequence in self.cache.device.keys for sequence in fed)
        reach = BestOfHost(self.cache, fed, self._backend) if recalls else None
        hidden, shares = self._decoder.run(step, inputs, paged, tail, reach)
        if targets:
            self._generation.add_scores(fed, targets, shares)
        self._generation.fed(fed)
        return hidden

    def _workspace(self, keep: KeepPlan, rows: int) -> int:
        """Bytes of the prefill of one prompt, of which ``rows`` reach this shard."""
        surviving = rows
        if keep.drops_hidden_states:
            surviving = keep.kept[min(self.layout.first + 1, len(keep.kept) - 1)]
        observes = keep.observes
        window = 0
        if isinstance(observes, RowAttention) and (keep.fraction < 1 or keep.remembers):
            window = rows if observes.rows is None else min(observes.rows, rows)
        return prefill_workspace_bytes(
            *(self._model_config, self._backend, rows, surviving, window),
            *(self._dtype.itemsize, self._settings.execute.block_rows),
        )

    def _park(self, sequence: int) -> ReleasedSequence:
        return self._complete(self.cache.report(sequence), self._sequences[sequence])

    def _release(self, sequence: int) -> ReleasedSequence:
        self._generation.close(sequence)
        known = self._sequences.pop(sequence)
        positions = self._positions(sequence) if known.trace else ()
        return replace(self._complete(self.cache.release(sequence), known), positions=positions)

    def _complete(self, report: ReleasedSequence, sequence: "_Sequence") -> ReleasedSequence:
        peak = device_memory(self.device).peak
        return replace(report, workspace_bytes=sequence.workspace_bytes, device_peak_bytes=peak)

    def _sample(self, step: Step, hidden: torch.Tensor) -> Work:
        """Turns each sequence's last row into its next token, or in a verification every row."""
        if step.draws != step.rows:
            ends = zip(np.cumsum(step.rows), step.draws, strict=True)
            last = np.concatenate([np.arange(end - count, end) for end, count in ends])
            hidden = hidden[to_device(last, self.device)]
        logits = self.model.logits(hidden)
        drawings = [self._sequences[sequence].drawing for sequence in step.drawing]
        tokens, logprobs = draw(logits, drawings, step.output_indices, step.forced)
        top = []
        for row, spec in enumerate(step.new):
            if spec.trace:
                best = logits[row].topk(TRACED_LOGITS)
                values = (tuple(best.indices.tolist()), tuple(best.values.tolist()))
                top.append(TopLogits(spec.sequence, *values))
        return replace(step, top_logits=tuple(top), logprobs=logprobs), torch.tensor(tokens)

    def _traces(self, step: Step) -> tuple[PrefillTrace, ...]:
        return tuple(
            PrefillTrace(spec.sequence, self._positions(spec.sequence)) for spec in step.new if spec.trace
        )

    def _positions(self, sequence: int) -> tuple[Positions, ...]:
        return tuple(self.cache.positions(sequence, layer) for layer in range(self.cache.layers))

    def _report(self, step: Step) -> Step:
        device = device_memory(self.device)
        memory = ShardMemory(
            pages_in_use=self.cache.device.pool.allocator.pages_in_use,
            host_bytes=self.cache.host.bytes_in_use,
            resident_bytes=self._process.memory_info().rss,
            device_bytes=device.allocated,
            device_peak_bytes=device.peak,
        )
        return replace(step, memory=(*step.memory, memory))


def _places(step: Step, plans: Sequence[KeepPlan]) -> Positions:
    """The positions at which a prefill's rows are rotated: within the cache where their plans say so."""
    places, end = step.positions.copy(), 0
    for keep, rows in zip(plans, step.rows, strict=True):
        end += rows
        if keep.within_cache:
            places[end - rows : end] = places[end - 1] - np.arange(rows)[::-1]
    return places


@dataclass(frozen=True)
class _Sequence:
    """How a sequence is drawn, what its prefill took, and whether it is traced."""

    drawing: Drawing
    workspace_bytes: int
    trace: bool
