"""The way of a step through the shards."""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

from workers.engine.stage import Stage
from workers.engine.step import Step

Outcome = tuple[Step, tuple[int, ...]]


class Pipeline(Protocol):
    """Takes steps in and gives them back, in order, when they have passed all shards."""

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        """Sends a step on its way; ``tokens`` int64 [rows]."""

    def collect(self) -> Outcome:
        """Waits for the next step to come back, with the token ids that it drew."""


class LocalPipeline:
    """All shards in this process, one after the other; a step runs when it is collected."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self._submitted: deque[tuple[Step, torch.Tensor]] = deque()

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self._submitted.append((step, tokens))

    def collect(self) -> Outcome:
        step, tensor = self._submitted.popleft()
        for stage in self.stages:
            step, tensor = stage.run(step, tensor)
        return step, tuple(tensor.tolist())
