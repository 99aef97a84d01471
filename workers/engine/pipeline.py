"""The way of a step through the shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch

from pyramidserve.errors import EngineError
from workers.engine.interleave import Interleave, OnAdvance, unobserved
from workers.engine.settings import EngineSettings
from workers.engine.stage import Stage, StageConfig, StageFacts
from workers.kv.link import HostLink
from workers.model.config import ModelConfig
from workers.schedule.memory import PipelineLayout
from workers.schedule.step import Step

Outcome = tuple[Step, tuple[int, ...]]


class Pipeline(Protocol):
    """Takes steps in and gives them back when they have passed all shards; short ones overtake prefills."""

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        """Sends a step on its way; ``tokens`` int64 [rows]."""

    def collect(self) -> Outcome:
        """Waits for the next step to come back, with the token ids that it drew."""


class LocalPipeline:
    """All shards in this process, one after the other; steps run while results are waited for."""

    def __init__(self, stages: Sequence[Stage], on_advance: OnAdvance = unobserved) -> None:
        """``on_advance``: see ``Interleave``."""
        self._shards = [Interleave(stage, on_advance) for stage in stages]

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self._shards[0].add(step, tokens)

    def collect(self) -> Outcome:
        while not all(shard.idle for shard in self._shards):
            for shard, following in zip_longest(self._shards, self._shards[1:]):
                done = None if shard.idle else shard.advance()
                if done is None:
                    continue
                if following is None:
                    step, tokens = done
                    return step, tuple(tokens.tolist())
                following.add(*done)
        raise EngineError("no step is under way: one that has failed does not come back")


def pipeline_layout(
    facts: Sequence[StageFacts], model: ModelConfig, settings: EngineSettings
) -> PipelineLayout:
    """The layout of a pipeline whose shards say ``facts`` of themselves, in order of rank."""
    return PipelineLayout(
        shards=tuple(fact.layout for fact in facts),
        pages=tuple(fact.pages for fact in facts),
        host_pages=tuple(fact.host_bytes_limit // fact.layout.host_page_bytes for fact in facts),
        layers=model.layers,
        max_sequences=settings.max_sequences,
        max_sessions=settings.max_sessions,
        max_prefill_tokens=settings.max_prefill_tokens,
        tuning=settings.schedule,
        frequencies_length=model.frequencies_length,
        context=model.context,
    )


@dataclass(frozen=True)
class Connected:
    """A pipeline with the facts of all its shards, and those of them that are in this process."""

    pipeline: Pipeline
    facts: tuple[StageFacts, ...]
    stages: tuple[Stage, ...]


Connect = Callable[[Sequence[StageConfig]], Connected]


def connect_local(
    configs: Sequence[StageConfig],
    on_advance: OnAdvance = unobserved,
    link: Callable[[], HostLink] | None = None,
) -> Connected:
    """Builds all shards in this process. Raises CheckpointError or ConfigurationError.

    ``link`` builds each shard's link to the host, in place of the device's own.
    """
    stages = tuple(Stage(config, link() if link else None) for config in configs)
    return Connected(LocalPipeline(stages, on_advance), tuple(stage.facts("") for stage in stages), stages)
