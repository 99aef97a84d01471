"""The way of a step through the shards."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import torch

from workers.engine.stage import Stage
from workers.engine.step import Step
from workers.engine.turns import OnTurn, Turns

Outcome = tuple[Step, tuple[int, ...]]


class Pipeline(Protocol):
    """Takes steps in and gives them back, in order, when they have passed all shards."""

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        """Sends a step on its way; ``tokens`` int64 [rows]."""

    def collect(self) -> Outcome:
        """Waits for the next step to come back, with the token ids that it drew."""


class LocalPipeline:
    """All shards in this process, which take turns; steps run while results are waited for."""

    def __init__(self, stages: Sequence[Stage], on_turn: OnTurn = lambda kind, seconds: None) -> None:
        """``on_turn``: see ``Turns``."""
        self._shards = [Turns(stage, on_turn) for stage in stages]

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self._shards[0].add(step, tokens)

    def collect(self) -> Outcome:
        while True:
            for shard, following in zip_longest(self._shards, self._shards[1:]):
                done = None if shard.idle else shard.advance()
                if done is None:
                    continue
                if following is None:
                    step, tokens = done
                    return step, tuple(tokens.tolist())
                following.add(*done)
