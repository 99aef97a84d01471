"""Measures cells part by part: what is lost with what they do not hold, and how fast they are."""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch

from pyramidserve.errors import InvalidRequestError, UnavailableError
from workers.bench.cell import BASELINE, Cell, Holding
from workers.bench.facts import Asking, talks
from workers.bench.instructions import instructed
from workers.bench.measure import TurnLog, measure, warm_up
from workers.bench.parts.facts import Facts
from workers.bench.parts.instructions import Instructions
from workers.bench.parts.part import AT_ONCE, Done, Part, Record
from workers.bench.parts.passages import Passages, problem_passages, text_passages
from workers.bench.parts.tasks import Tasks
from workers.bench.problems import fetch, read
from workers.bench.settings import DECODE, PREFILL, QualitySettings
from workers.bench.tasks import items
from workers.bench.workload import Workload, named_workload, requests
from workers.budget.kv_format import KV_FORMATS
from workers.budget.kv_share import KVShare
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import Connect, connect_local
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.tokenizer import Tokenizer

SEED = 1
# In their order; what is measured where nothing else is asked for.
USUAL_PARTS = ("loss", "facts", "instructions", "tasks", "humaneval")
PARTS = (*USUAL_PARTS, "speed")
# Sequences of the greatest length that an engine has memory for.
FULL_SEQUENCES = 4
# One request of at most so many tokens warms an engine up.
WARM_PROMPT, WARM_OUTPUT = 512, 8


class Quality:
    """Measures cells with the same texts, questions and workloads.

    Attributes:
        parts: those that can be measured, of those that are asked for.
        made: their texts and questions, but of "speed".
    """

    def __init__(self, settings: QualitySettings, parts: Sequence[str], say: Callable[[str], None]) -> None:
        """Asks what the cells share; ``say`` is told each lengthy step before it begins.

        Raises InvalidRequestError where the model or the text is too short for ``settings``.
        """
        self._settings = settings
        self._item_bytes = getattr(torch, settings.dtype).itemsize
        self._checkpoint = resolve_checkpoint(settings.model, say)
        self._model = read_config(self._checkpoint)
        self._work = [named_workload(name) for name in settings.workloads]
        tokenizer = Tokenizer(self._checkpoint)
        made = {part: self._make(part, tokenizer, say) for part in parts if part != "speed"}
        self.made = {part: each for part, each in made.items() if each}
        self.parts = tuple(part for part in parts if part == "speed" or part in self.made)
        for part in self.parts:
            self._check(part)
        self._held: tuple[str, Asking] | None = None
        for part, each in self.made.items():
            say(f"preparing {part}")
            each.begin(self._asking(BASELINE.kv_dtype))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that text goes on behind."""
        return self._settings.prompts[-1]

    def prompt_tokens(self, part: str) -> int:
        """Tokens of the prompts that a cell reads."""
        if part in self.made:
            return self.made[part].prompt_tokens
        return sum(each.requests * each.prompt for each in self._work)

    def holding(self, cell: Cell) -> Holding:
        """``cell`` with what its format comes to for the model."""
        form = KV_FORMATS[self._settings.dtype if cell.kv_dtype == "auto" else cell.kv_dtype]
        return Holding(cell, KVShare.of(form, self._model.head_size))

    def measure(self, cell: Cell, part: str, full: Record | None, done: Done) -> Record:
        """What is found of a part; ``full`` is the baseline's, None for the baseline itself.

        Raises whatever the cell's policy raises.
        """
        holding = self.holding(cell)
        if part == "speed":
            self._held = None
            return {name: self._timed(name, holding, done) for name in self._settings.workloads}
        try:
            return self.made[part].measure(self._asking(cell.kv_dtype), holding, full, done)
        except Exception:
            self._held = None  # what a policy has broken is no one else's
            raise

    def _make(self, part: str, tokenizer: Tokenizer, say: Callable[[str], None]) -> Part | None:
        """A part with its texts and questions; None where they cannot be had."""
        settings = self._settings
        if part == "loss":
            return Passages(text_passages(tokenizer, settings.prompts, settings.goes_on, settings.texts))
        if part == "tasks":
            return Tasks(items(tokenizer, settings.task_prompts, settings.tasks))
        if part == "humaneval":
            try:
                return Passages(problem_passages(tokenizer, read(fetch())))
            except UnavailableError as error:
                say(f"humaneval is left out: {error}")
                return None
        held = talks(tokenizer, settings.document, settings.talks, SEED)
        if len(held) < settings.talks:
            raise InvalidRequestError(
                f"--talks is {settings.talks}; what every Python brings along has {len(held)} of "
                f"--document {settings.document}: give less"
            )
        if part == "instructions":
            return Instructions(instructed(held, SEED), settings.document)
        return Facts(held, settings.document)

    def _check(self, part: str) -> None:
        """Raises InvalidRequestError where a sequence may be longer than the model's context."""
        settings, context = self._settings, self._model.context
        sizes = {
            "loss": f"--prompts {settings.prompts[-1]} and --goes-on {settings.goes_on}",
            "facts": f"--document {settings.document} with questions",
            "instructions": f"--document {settings.document} with instructions",
            "tasks": f"--task-prompts {settings.task_prompts[-1]} with answers",
            "humaneval": "--parts humaneval",
            "speed": f"--workloads {' '.join(settings.workloads)}",
        }
        if part in self.made:
            longest = self.made[part].longest
        else:
            longest = max((each.prompt + each.output for each in self._work), default=0)
        if longest > context:
            raise InvalidRequestError(
                f"{sizes[part]} take up to {longest} tokens; the context of {settings.model} is {context}: "
                "give less"
            )

    def _asking(self, kv_dtype: str) -> Asking:
        """An engine that reads, for all cells of a format that come one after another."""
        if self._held is None or self._held[0] != kv_dtype:
            self._held = None
            longest = max(each.longest for each in self.made.values())
            engine = self._engine(kv_dtype, Workload(FULL_SEQUENCES, longest, 0), AT_ONCE)
            self._held = kv_dtype, Asking(engine)
        return self._held[1]

    def _timed(self, name: str, holding: Holding, done: Done) -> dict[str, float]:
        """How long the prefills of a workload take, and how fast all its streams go on together."""
        workload, log = named_workload(name), TurnLog()
        compression, kv_dtype = holding.asks(workload.prompt), holding.cell.kv_dtype
        warm = Workload(1, min(WARM_PROMPT, workload.prompt), min(WARM_OUTPUT, workload.output))
        connect = partial(connect_local, on_advance=log)
        engine = self._engine(kv_dtype, workload, workload.requests, connect)
        warm_up(engine, log, requests(warm, engine.tokenizer, compression))
        run = measure(engine, log, requests(workload, engine.tokenizer, compression))
        done(workload.requests * workload.prompt)
        timed = {PREFILL: run.prefill_seconds}
        if run.decode_tokens_per_second is not None:
            timed[DECODE] = run.decode_tokens_per_second
        return timed

    def _engine(
        self, kv_dtype: str, workload: Workload, sequences: int, connect: Connect = connect_local
    ) -> Engine:
        """An engine with room for ``workload``, and for ``sequences`` at once."""
        gc.collect()  # engines are in cycles, and those before this one had pools
        pool_bytes = workload.pool_bytes(self._model, self._item_bytes)
        form = self._settings.dtype if kv_dtype == "auto" else kv_dtype
        config = EngineConfig(
            str(self._checkpoint),
            dtype=self._settings.dtype,
            kv_dtype=kv_dtype,
            # Codes are what is measured on the device; what comes back is as it was computed.
            host_kv_dtype=self._settings.dtype if KV_FORMATS[form].scale_bytes else "auto",
            device=self._settings.device,
            kv_bytes=pool_bytes,
            host_bytes=pool_bytes,
            max_sequences=sequences,
        )
        return Engine(config, connect)
