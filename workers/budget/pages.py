"""Who owns which page: the allocator of a pool, without the pool's memory."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

PAGE_TOKENS = 16

Tokens = TypeVar("Tokens", int, npt.NDArray[np.int64])


class OutOfPagesError(Exception):
    """The pool has fewer free pages than asked for; nothing was taken."""


class IntegrityError(Exception):
    """A pool's books do not balance."""


def pages_for(tokens: Tokens) -> Tokens:
    """Pages that ``tokens`` tokens of one layer need; of each, for an array."""
    return -(-tokens // PAGE_TOKENS)


class PageAllocator:
    """A fixed number of pages, each free or owned by one owner.

    Pages are handed out last-freed first, so that memory that was never touched stays untouched.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._owner: dict[int, Hashable] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def pages_in_use(self) -> int:
        return len(self._owner)

    def pages_of(self, owner: Hashable) -> set[int]:
        """The pages of ``owner``."""
        return {page for page, own in self._owner.items() if own == owner}

    def require(self, count: int) -> None:
        """Raises OutOfPagesError when fewer than ``count`` pages are free."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages wanted, {len(self._free)} of {self.pages} free")

    def allocate(self, count: int, owner: Hashable) -> npt.NDArray[np.int32]:
        """Takes ``count`` pages for ``owner``: their indices, int32 [count].

        Raises OutOfPagesError and takes nothing when fewer are free.
        """
        self.require(count)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owner[page] = owner
        return np.array(taken, dtype=np.int32)

    def release(self, pages: Sequence[int] | npt.NDArray[np.int32], owner: Hashable) -> None:
        """Gives ``pages`` of ``owner`` back. Raises IntegrityError if it does not own them."""
        # The last first, so that they are handed out again in the order in which they lie: reading them is
        # faster then.
        for page in map(int, reversed(pages)):
            if self._owner.get(page) != owner:
                raise IntegrityError(
                    f"page {page} is released by {owner!r} but owned by {self._owner.get(page)!r}"
                )
            del self._owner[page]
            self._free.append(page)

    def hand_over(self, pages: npt.NDArray[np.int32], owner: Hashable, heir: Hashable) -> None:
        """Makes ``pages`` of ``owner`` those of ``heir``. Raises IntegrityError if it does not own them."""
        for page in pages.tolist():
            if self._owner.get(page) != owner:
                raise IntegrityError(f"page {page} is not {owner!r}'s but {self._owner.get(page)!r}'s")
            self._owner[page] = heir

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is either free, once, or owned."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a page is free twice")
        if free & self._owner.keys():
            raise IntegrityError(f"pages {sorted(free & self._owner.keys())} are free and owned")
        if free | self._owner.keys() != set(range(self.pages)):
            raise IntegrityError(f"{len(free)} free + {len(self._owner)} owned pages are not {self.pages}")
