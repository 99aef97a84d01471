"""A batch of prompts and outputs of given sizes, and what its measured decode steps come to."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from bench.gpu.card import limits
from bench.gpu.context import Context
from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineRequest
from workers.engine.loop import SequenceTokens
from workers.model.config import ModelConfig
from workers.model.work import weights_read

GIGABYTE = 1e9


@dataclass(frozen=True)
class Load:
    """``batch`` prompts at once and ``output`` tokens of each, ``steps`` of them at each end measured."""

    prompt: int
    output: int
    batch: int
    steps: int = 32
    repetitions: int = 2

    @property
    def name(self) -> str:
        return f"{self.prompt}+{self.output}"

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """Tokens that are there when the steps begin, and those that are still to come."""
        left = 2 * self.steps  # those that come first decode while the others are prefilled
        return (self.prompt, self.output), (self.prompt + self.output - left, left)


def random_ids(draw: random.Random, count: int, model: ModelConfig) -> list[int]:
    """Ids of a prompt."""
    return [draw.randrange(3, model.vocabulary) for _ in range(count)]


def submit_batch(
    engine: Engine, compression: Compression, batch: int, prompt: int, output: int
) -> set[int]:
    """Submits ``batch`` random prompts, the same for the same size; returns their sequences."""
    draw, stopping = random.Random(prompt), Stopping(output, ignore_eos=True)
    return {
        engine.submit(
            EngineRequest(
                random_ids(draw, prompt, engine.model), stopping=stopping, compression=compression
            )
        )[0]
        for _ in range(batch)
    }


def until_all_decode(engine: Engine, sequences: set[int], check: Callable[[], None] = lambda: None) -> None:
    """Steps until each of ``sequences`` has a token; ``check`` is called before each step."""
    waiting = set(sequences)
    while waiting:
        check()
        waiting -= {event.sequence for event in engine.step() if isinstance(event, SequenceTokens)}


def clear(engine: Engine, sequences: set[int]) -> None:
    """Cancels ``sequences`` and steps until the engine is idle."""
    for sequence in sequences:
        engine.cancel(sequence)
    while not engine.idle:
        engine.step()


def decoded(
    context: Context,
    model: ModelConfig,
    batch: int,
    prompt: int,
    first_tokens: float,
    steps: list[float],
    held: int,
) -> dict[str, Any]:
    """What decode ``steps`` behind prompts come to, with ``held`` bytes of KV behind the last.

    ``roofline``: the least that the card needs to read weights and KV once, and to multiply, over a step.
    """
    step, card, weights = median(steps), limits(context), weights_read(model)
    itemsize = 4 if context.tiny else 2
    least = max(
        (weights * itemsize + held) / card.read_bytes_per_second,
        2 * weights * batch / card.flops_per_second,
    )
    return {
        "prompt": prompt,
        "first_tokens_s": round(first_tokens, 3),
        "steps": len(steps),
        "step_ms": round(step * 1e3, 3),
        "slowest_step_ms": round(max(steps) * 1e3, 3),
        "decode_tokens_s": round(batch / step, 1),
        "kv_gb": round(held / GIGABYTE, 4),
        "roofline": round(least / step, 4),
    }


def whole(load: Load, batch: int, ends: list[dict[str, Any]]) -> dict[str, float]:
    """Of the whole output, from its two ends: tokens a second, and the most KV."""
    seconds = ends[0]["first_tokens_s"] + (load.output - 1) * mean(each["step_ms"] for each in ends) / 1e3
    return {
        "tokens_s": round(batch * load.output / seconds, 2),
        "kv_gb": max(each["kv_gb"] for each in ends),
    }
