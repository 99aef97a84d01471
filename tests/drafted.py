"""Requests whose replies are compared with the full cache's."""

import random

from pyramidserve.types import Compression, Reply, Sampling, Stopping
from workers.engine.engine import EngineRequest


def drafted(compression: Compression, output: int, count: int) -> list[EngineRequest]:
    """So many, greedy and sampled in turns, the first for ``output`` tokens and each for 7 fewer."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 259) for _ in range(draw.randrange(20, 90))] for _ in range(count)]
    return [
        EngineRequest(
            prompt,
            Sampling(temperature=0.7 * (number % 2), seed=number),
            Stopping(max_tokens=output - 7 * number, ignore_eos=True),
            compression,
        )
        for number, prompt in enumerate(prompts)
    ]


def ids(replies: list[Reply]) -> list[tuple[int, ...]]:
    """Tokens of each."""
    return [reply.token_ids for reply in replies]
