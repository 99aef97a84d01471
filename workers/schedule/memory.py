"""The memory of a pipeline: what its sequences hold, will take, and have on the host instead."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from workers.budget.footprint import Counts, ShardLayout, host_pages
from workers.budget.forecast import Forecast, Growth, growth
from workers.budget.ledger import Ledger
from workers.budget.pages import IntegrityError
from workers.policies.registry import plan
from workers.schedule.sequence import RunningSequence, SequenceRequest
from workers.schedule.tuning import ScheduleTuning


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline's shards in order of rank, its bounds and its tuning.

    Attributes:
        shards: layers and page size of each.
        pages: size of each shard's pool, in pages.
        host_pages: how many pages each shard's host memory can hold.
        layers: layers of the whole model.
        max_sequences: sequences at once, at most.
        max_sessions: parked sessions, at most.
        max_prefill_tokens: rows of the prefill micro-batches of all shards together, unless one prompt
            alone is longer.
        tuning: how its scheduler weighs one against the other.
        frequencies_length: see ``ModelConfig``; sequences of which it says the same are rotated alike.
        context: tokens that a prefill attends to, at most.
    """

    shards: tuple[ShardLayout, ...]
    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    layers: int
    max_sequences: int
    max_sessions: int
    max_prefill_tokens: int
    tuning: ScheduleTuning = ScheduleTuning()
    frequencies_length: Callable[[int], int] = lambda length: 0
    context: int = 1 << 30


class PipelineMemory:
    """The pages of admitted sequences: held now, expected to be held, and moved to the host. Pure.

    Attributes:
        suspended: pages that suspended sequences had on the device, as which they are on the host.
        spilled: pages of the host that are kept free for what sequences must not lose.
        parked: pages that parked sessions had, likewise; none while they are on the device.
    """

    def __init__(self, layout: PipelineLayout) -> None:
        self._layout = layout
        self.ledger = Ledger(layout.shards, layout.pages, layout.max_sequences + layout.max_sessions)
        self.forecast = Forecast(layout.pages, layout.max_sequences)
        self.suspended: dict[int, Counts] = {}
        self.spilled: dict[int, Counts] = {}
        self.parked: dict[int, Counts] = {}

    def __len__(self) -> int:
        """How many sequences there are that are not parked."""
        return len(self.ledger) - len(self.parked)

    @property
    def unused(self) -> bool:
        """Whether nobody holds any pages."""
        return bool((self.ledger.free == self.ledger.pages).all())

    @property
    def full(self) -> bool:
        """Whether there are as many sequences as there may be, those that are about to go included."""
        return len(self) == self._layout.max_sequences or self.ledger.full

    @property
    def host_is_overfull(self) -> bool:
        """Whether parked sessions must leave the host, so that what runs finds its room there."""
        return not self._host_has_room(*self._spilled(parked=True), moved=self.parked.values())

    def growth(self, request: SequenceRequest) -> Growth:
        """The pages that ``request`` will take of each shard."""
        keep = plan(request.compression, len(request.prompt_ids), self._layout.layers)
        expected = request.expected_tokens or request.max_tokens
        return growth(keep, self._layout.shards, expected, request.max_tokens)

    def probably_fits(self, request: SequenceRequest) -> bool:
        """Whether ``request`` will probably find room until its end."""
        return (
            not self.suspended
            and not self.full
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

    def _spilled(self, parked: bool) -> list[Counts]:
        return [pages for key, pages in self.spilled.items() if (key in self.parked) == parked]

    def _host_has_room(self, *pages: Counts, moved: Iterable[Counts] = ()) -> bool:
        """Whether the host has room beside what may not leave it, which is all but parked sessions.

        For ``pages`` of its own, and those of the device that have ``moved``.
        """
        nothing: Counts = np.zeros(len(self._layout.pages), dtype=np.int64)
        images = map(self._image, (*self.suspended.values(), *moved))
        taken = sum((*images, *self._spilled(parked=False), *pages), nothing)
        return bool((taken <= self._layout.host_pages).all())

    def _image(self, pages: Counts) -> Counts:
        """Pages of the host that ``pages`` of the device take there."""
        pairs = zip(self._layout.shards, pages.tolist(), strict=True)
        return np.array([shard.pages_on_host(count) for shard, count in pairs])

    def add(self, sequence: RunningSequence) -> bool:
        """Takes in a sequence, which holds nothing yet; False if one too many, or too large."""
        key, request = sequence.request.sequence, sequence.request
        on_host = self.host_pages(request)
        if self.full or not self._host_has_room(on_host) or not self.could_ever_hold(request):
            return False
        self.ledger.add(key, sequence.plan)
        self.forecast.add(key, self.growth(request))
        if on_host.any():
            self.spilled[key] = on_host
        return True

    def remove(self, key: int) -> None:
        """Forgets a sequence, or a parked one; what it held is free."""
        self.ledger.remove(key)
        self.spilled.pop(key, None)
        if self.parked.pop(key, None) is None and self.suspended.pop(key, None) is None:
            self.forecast.remove(key)

    def park(self, key: int) -> bool:
        """A sequence has come to its end, and its session is parked; returns whether it is on the host."""
        on_host = self.suspended.pop(key, None)
        if on_host is None:
            self.forecast.remove(key)
            on_host = np.zeros(len(self._layout.pages), dtype=np.int64)
        self.parked[key] = on_host
        return bool(on_host.any())

    def park_on_host(self, key: int) -> bool:
        """Notes that a parked session is on its way to the host; False if that has no room for it."""
        held = self.ledger.held(key).copy()
        if not self._host_has_room(*self._spilled(parked=True), moved=(held, *self.parked.values())):
            return False
        self.parked[key] = held
        return True

    def bring_back(self, key: int) -> bool:
        """Notes that a parked session is on its way to the device; False if that has no room for it."""
        if not self.ledger.fits([key], self.parked[key][None]):
            return False
        self.ledger.hold([key], self.parked[key][None])
        self.parked[key] = np.zeros(len(self._layout.pages), dtype=np.int64)
        return True

    def go_on(self, parked: int, generated: int, key: int) -> bool:
        """Hands over what a parked session holds to its next turn; False if there is no room for both.

        ``generated``: of the tokens of the parked one.
        """
        needs = self.ledger.needs_to_go_on(parked, generated, key)
        pages = np.concatenate([np.zeros_like(needs), needs])
        if not self.ledger.fits([parked, key], pages):
            return False
        self.ledger.hold([parked, key], pages)
        self.remove(parked)
        return True

    def hold(self, keys: Sequence[int], fed: Sequence[int], coming: Sequence[int] = ()) -> bool:
        """Makes sequences hold what they need, or returns False where there is no room for all.

        Args:
            fed: output tokens of each that are in its KV.
            coming: tokens of each in the next step, before it compresses; none unless given.
        """
        needs = self.ledger.needs(keys, fed, coming)
        if not self.ledger.fits(keys, needs):
            return False
        self.ledger.hold(keys, needs)
        for key, tokens in zip(keys, fed, strict=True):
            self.forecast.advance(key, tokens)
        return True

    def hold_nothing(self, key: int) -> None:
        """A sequence has given its pages up."""
        self.ledger.hold([key], np.zeros((1, len(self._layout.pages)), dtype=np.int64))

    def suspend(self, key: int) -> bool:
        """Notes that a sequence is on its way to the host; False if that has no room for it."""
        held = self.ledger.held(key).copy()
        if not self._host_has_room(*self._spilled(parked=True), moved=(held, *self.parked.values())):
            return False
        self.suspended[key] = held
        self.forecast.remove(key)
        return True

    def resume(self, sequence: RunningSequence) -> bool:
        """Notes that a sequence is on its way back; False if it would not find room until its end.

        Where nobody else holds any pages it always does.
        """
        key, fed = sequence.request.sequence, sequence.fed
        needs, expected = self.ledger.needs([key], [fed]), self.growth(sequence.request)
        if not (self.unused or (self.ledger.fits([key], needs) and self.forecast.fits(expected, fed))):
            return False
        self.ledger.hold([key], needs)
        self.forecast.add(key, expected, fed)
        del self.suspended[key]
        return True

    def check_integrity(self, sequences: Collection[int]) -> None:
        """Raises IntegrityError unless the pages belong to ``sequences``, or parked ones."""
        self.ledger.check_integrity()
        if not len(self) == len(sequences) == len(self.forecast) + len(self.suspended):
            raise IntegrityError(
                f"{len(self)} sequences in the ledger and {len(self.forecast)} in the forecast, "
                f"{len(self.suspended)} suspended, are not {len(sequences)}"
            )
