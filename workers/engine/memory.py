"""The memory of a pipeline: what its sequences hold, will take, and have on the host instead."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from workers.compression.policies import plan
from workers.engine.sequence import RunningSequence, SequenceRequest
from workers.kv.footprint import ShardLayout, host_pages
from workers.kv.forecast import Forecast, Growth, growth
from workers.kv.ledger import Counts, Ledger
from workers.kv.pages import IntegrityError


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline's shards in order of rank, and its bounds.

    Attributes:
        shards: layers and page size of each.
        pages: size of each shard's pool, in pages.
        host_pages: how many pages each shard's host memory can hold.
        layers: layers of the whole model.
        max_sequences: sequences at once, at most.
        max_prefill_tokens: rows of the prefill micro-batches of all shards together, unless one prompt
            alone is longer.
    """

    shards: tuple[ShardLayout, ...]
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    layers: int
    max_sequences: int
    max_prefill_tokens: int


class PipelineMemory:
    """The pages of admitted sequences: held now, expected to be held, and moved to the host. Pure.

    Attributes:
        suspended: pages that suspended sequences had, and take of the host.
        spilled: pages of the host that are kept free for what sequences must not lose.
    """

    def __init__(self, layout: PipelineLayout) -> None:
        self._layout = layout
        self.ledger = Ledger(layout.shards, layout.pages, layout.max_sequences)
        self.forecast = Forecast(layout.pages, layout.max_sequences)
        self.suspended: dict[int, Counts] = {}
        self.spilled: dict[int, Counts] = {}

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.ledger)

    @property
    def unused(self) -> bool:
        """Whether nobody holds any pages."""
        return bool((self.ledger.free == self.ledger.pages).all())

    def growth(self, request: SequenceRequest) -> Growth:
        """The pages that ``request`` will take of each shard."""
        keep = plan(request.compression, len(request.prompt_ids), self._layout.layers)
        expected = request.expected_tokens or request.max_tokens
        return growth(keep, self._layout.shards, expected, request.max_tokens)

    def fits(self, request: SequenceRequest) -> bool:
        """Whether ``request`` will probably find room until its end."""
        return (
            not self.suspended
            and self._host_has_room(self.host_pages(request))
            and self.forecast.fits(self.growth(request))
        )

    def host_pages(self, request: SequenceRequest) -> Counts:
        """Pages of each shard's host memory that must be kept free for ``request``."""
        keep = plan(request.compression, len(request.prompt_ids), self._layout.layers)
        return np.array([host_pages(keep, shard, request.max_tokens) for shard in self._layout.shards])

    def could_ever_hold(self, request: SequenceRequest) -> bool:
        """Whether ``request`` fits when nothing else is there."""
        on_host = self.host_pages(request) <= self._layout.host_pages
        return bool(on_host.all()) and self.forecast.could_ever_hold(self.growth(request))

    def _host_has_room(self, pages: Counts) -> bool:
        taken = sum((*self.suspended.values(), *self.spilled.values()), pages)
        return bool((taken <= self._layout.host_pages).all())

    def add(self, sequence: RunningSequence) -> bool:
        """Takes in a sequence, which holds nothing yet; False if one too many, or too large."""
        key, request = sequence.request.sequence, sequence.request
        on_host = self.host_pages(request)
        full = len(self) == self._layout.max_sequences or not self._host_has_room(on_host)
        if full or not self.could_ever_hold(request):
            return False
        self.ledger.add(key, sequence.plan)
        self.forecast.add(key, self.growth(request))
        if on_host.any():
            self.spilled[key] = on_host
        return True

    def remove(self, key: int) -> None:
        """Forgets a sequence; what it held is free."""
        self.ledger.remove(key)
        self.spilled.pop(key, None)
        if self.suspended.pop(key, None) is None:
            self.forecast.remove(key)

    def hold(self, keys: Sequence[int], fed: Sequence[int], more: int = 0) -> bool:
        """Makes sequences hold what they need, or returns False where there is no room for all.

        Args:
            fed: output tokens of each that are in its KV.
            more: those of the next step, before it compresses.
        """
        needs = self.ledger.needs(keys, fed, more)
        if not self.ledger.fits(keys, needs):
            return False
        self.ledger.hold(keys, needs)
        for key, done in zip(keys, fed, strict=True):
            self.forecast.advance(key, done)
        return True

    def hold_nothing(self, key: int) -> None:
        """A sequence has given its pages up."""
        self.ledger.hold([key], np.zeros((1, len(self._layout.pages)), dtype=np.int64))

    def suspend(self, key: int) -> bool:
        """Notes that a sequence is on its way to the host; False if that has no room for it."""
        held = self.ledger.held(key).copy()
        if not self._host_has_room(held):
            return False
        self.suspended[key] = held
        self.forecast.remove(key)
        return True

    def resume(self, sequence: RunningSequence) -> bool:
        """Notes that a sequence is on its way back; False if it would not find room until its end.

        Where nobody else holds any pages it always does.
        """
        key, fed = sequence.request.sequence, sequence.fed
        needs, more = self.ledger.needs([key], [fed]), self.growth(sequence.request)
        if not (self.unused or (self.ledger.fits([key], needs) and self.forecast.fits(more, fed))):
            return False
        self.ledger.hold([key], needs)
        self.forecast.add(key, more, fed)
        del self.suspended[key]
        return True

    def check_integrity(self, sequences: Collection[int]) -> None:
        """Raises IntegrityError unless the pages belong to ``sequences``."""
        self.ledger.check_integrity()
        if not len(self) == len(sequences) == len(self.forecast) + len(self.suspended):
            raise IntegrityError(
                f"{len(self)} sequences in the ledger and {len(self.forecast)} in the forecast, "
                f"{len(self.suspended)} suspended, are not {len(sequences)}"
            )
