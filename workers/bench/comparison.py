"""Measures cells one by one: what is lost with what they evict, and how fast they are."""

import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import mean

import torch

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.cell import BASELINE, Cell
from workers.bench.facts import Asking, Fact, talks
from workers.bench.measure import TurnLog, measure, warm_up
from workers.bench.results import Row
from workers.bench.settings import DECODE, PREFILL, TALK_TOKENS, CompareSettings
from workers.bench.texts import windows
from workers.bench.workload import Workload, named_workload, requests
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import Connect, connect_local
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.tokenizer import Tokenizer
from workers.policies import registry

SEED = 1
# One request of at most so many tokens warms an engine up.
WARM_PROMPT, WARM_OUTPUT = 512, 8
# The ids of a first question about a document and of the full cache's reply, and what is asked behind it.
Begun = tuple[list[int], list[int], tuple[Fact, ...]]


class Comparison:
    """Measures cells with the same texts, questions and workloads.

    Each has engines of its own: what a policy breaks is gone with its cell.
    """

    def __init__(self, settings: CompareSettings, say: Callable[[str], None]) -> None:
        """Begins the talks; ``say`` is told each lengthy step before it begins.

        Raises InvalidRequestError where the model or the text is too short for ``settings``.
        """
        self._settings = settings
        self._item_bytes = getattr(torch, settings.dtype).itemsize
        self._checkpoint = resolve_checkpoint(settings.model, say)
        self._model = read_config(self._checkpoint)
        settings.check_context(self._model.context)
        asking = self._asking()
        self._texts = {tokens: self._read_behind(tokens, asking.tokenizer) for tokens in settings.prompts}
        self._talks: list[Begun] = []
        # How likely the right answers are without their documents, as logarithms.
        self._without: list[float] = []
        held = talks(asking.tokenizer, settings.document, settings.talks, SEED)
        if len(held) < settings.talks:
            raise InvalidRequestError(
                f"--talks is {settings.talks}; the reference of Python has {len(held)} of --document "
                f"{settings.document}: give less"
            )
        if held:
            say(f"asking about {len(held)} documents without them")
        for talk in held:
            self._without += _answers(asking, (*asking.begin(""), talk.asked), BASELINE.compression)
            self._talks.append((*asking.begin(talk.document), talk.asked))

    def measure(self, cell: Cell) -> Row:
        """Everything that is measured of a cell. Raises whatever its policy raises."""
        began, compression = time.perf_counter(), cell.compression
        numbers, answers = self._read(compression)
        for name in self._settings.workloads:
            numbers |= self._timed(name, compression)
        gains = tuple(with_it - without for with_it, without in zip(answers, self._without, strict=True))
        policy = registry.POLICIES[compression.policy]
        return Row(cell.name, policy.name, policy.version, numbers, gains, time.perf_counter() - began)

    def _read(self, compression: Compression) -> tuple[dict[str, float], list[float]]:
        """Of each length of prompt what is kept and lost, and how likely the right answers are."""
        asking, numbers = self._asking(), {}
        for tokens, texts in self._texts.items():
            reads = [asking.judge.read(text[:tokens], text[tokens:], compression) for text in texts]
            numbers[f"kept_{tokens}"] = mean(read.receipt.kv_keep_reached for read in reads)
            numbers[f"loss_{tokens}"] = mean(-read.total / self._settings.goes_on for read in reads)
        return numbers, [answer for talk in self._talks for answer in _answers(asking, talk, compression)]

    def _timed(self, name: str, compression: Compression) -> dict[str, float]:
        """How long the prefills of a workload take, and how fast all its streams go on together."""
        workload, log = named_workload(name), TurnLog()
        warm = Workload(1, min(WARM_PROMPT, workload.prompt), min(WARM_OUTPUT, workload.output))
        connect = partial(connect_local, on_advance=log)
        engine = self._engine(workload, connect)
        warm_up(engine, log, requests(warm, engine.tokenizer, compression))
        run = measure(engine, log, requests(workload, engine.tokenizer, compression))
        timed = {f"{name}_{PREFILL}": run.prefill_seconds}
        if run.decode_tokens_per_second is not None:
            timed[f"{name}_{DECODE}"] = run.decode_tokens_per_second
        return timed

    def _read_behind(self, tokens: int, tokenizer: Tokenizer) -> list[list[int]]:
        """Texts of a prompt and what is read behind it."""
        texts = windows(tokenizer, tokens + self._settings.goes_on, self._settings.texts)
        if len(texts) < self._settings.texts:
            raise InvalidRequestError(
                f"--texts is {self._settings.texts}; the reference of Python has {len(texts)} of "
                f"--prompts {tokens} and --goes-on {self._settings.goes_on}: give less"
            )
        return texts

    def _asking(self) -> Asking:
        """An engine for one request at a time, that reads."""
        longest = max(*self._settings.prompts, self._settings.document)
        return Asking(self._engine(Workload(1, longest, self._settings.goes_on + TALK_TOKENS)))

    def _engine(self, workload: Workload, connect: Connect = connect_local) -> Engine:
        """An engine with room for ``workload``."""
        gc.collect()  # engines are in cycles, and those before this one had pools
        pool_bytes = workload.pool_bytes(self._model, self._item_bytes)
        config = EngineConfig(
            str(self._checkpoint),
            dtype=self._settings.dtype,
            device=self._settings.device,
            kv_bytes=pool_bytes,
            host_bytes=pool_bytes,
            max_sequences=workload.requests,
        )
        return Engine(config, connect)


def _answers(asking: Asking, talk: Begun, compression: Compression) -> list[float]:
    """How likely each right answer of a talk is, as logarithms."""
    ids, reply, asked = talk
    told = asking.ask(ids, reply, asked, compression)
    return [each["log_probability"] for each in told]
