"""Promises of pages: what admitted sequences will take of every shard at their peak."""

from collections.abc import Hashable, Sequence

from workers.kv.pages import IntegrityError


class Ledger:
    """Pages of the shards of one pipeline, and which sequence has how many reserved on each."""

    def __init__(self, pages: Sequence[int], max_sequences: int) -> None:
        """``pages``: the shards' pools, in order of rank."""
        self.pages = tuple(pages)
        self.max_sequences = max_sequences
        self._reserved: dict[Hashable, tuple[int, ...]] = {}
        self._free = list(pages)

    def __len__(self) -> int:
        """Sequences with a reservation."""
        return len(self._reserved)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._reserved

    @property
    def free(self) -> tuple[int, ...]:
        """Pages of each shard that are not reserved."""
        return tuple(self._free)

    def could_ever_hold(self, pages: Sequence[int]) -> bool:
        """Whether a sequence that peaks at ``pages`` fits when nothing else is there."""
        return all(need <= total for need, total in zip(pages, self.pages, strict=True))

    def fits(self, pages: Sequence[int]) -> bool:
        """Whether a sequence that peaks at ``pages`` fits now."""
        return len(self._reserved) < self.max_sequences and all(
            need <= free for need, free in zip(pages, self._free, strict=True)
        )

    def reserve(self, sequence: Hashable, pages: Sequence[int]) -> None:
        """Promises ``pages`` to ``sequence``. Raises IntegrityError if they do not fit."""
        if sequence in self._reserved or not self.fits(pages):
            raise IntegrityError(f"{sequence!r} cannot reserve {pages} of {self._free}")
        self._reserved[sequence] = tuple(pages)
        self._free = [free - need for free, need in zip(self._free, pages, strict=True)]

    def release(self, sequence: Hashable) -> None:
        """Takes the promise to ``sequence`` back."""
        pages = self._reserved.pop(sequence)
        self._free = [free + need for free, need in zip(self._free, pages, strict=True)]

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free and reserved pages make up the pools."""
        for rank, total in enumerate(self.pages):
            reserved = sum(pages[rank] for pages in self._reserved.values())
            if reserved + self._free[rank] != total or self._free[rank] < 0:
                raise IntegrityError(
                    f"shard {rank}: {reserved} reserved + {self._free[rank]} free are not {total} pages"
                )
