"""Memory and copies that make misuse visible."""

from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.budget.pages import PAGE_TOKENS, IntegrityError, PageAllocator
from workers.kv.host import HostStore
from workers.kv.link import Finished


class PoisoningAllocator(PageAllocator):
    """Keeps NaN in every row that nobody owns, and fails when somebody else wrote there.

    Rows of codes are filled with bytes of 255: codes of any number, whose scale is NaN.
    """

    def __init__(self, pages: int, rows: torch.Tensor) -> None:
        super().__init__(pages)
        page = rows.shape[1:].numel() * rows.dtype.itemsize * PAGE_TOKENS
        self._memory = rows.view(torch.uint8).view(pages, page)
        self._memory.fill_(255)

    def allocate(self, count: int, owner: Hashable) -> npt.NDArray[np.int32]:
        self._check_poison()
        return super().allocate(count, owner)

    def release(self, pages: Sequence[int] | npt.NDArray[np.int32], owner: Hashable) -> None:
        super().release(pages, owner)
        self._memory[torch.tensor([*pages], dtype=torch.int64)] = 255

    def check_integrity(self) -> None:
        super().check_integrity()
        self._check_poison()

    def _check_poison(self) -> None:
        poisoned = (self._memory == 255).all(dim=1).numpy()
        if not poisoned[self._free].all():
            raise IntegrityError("something was written to a page that nobody owns")


def poison(store: HostStore) -> HostStore:
    """The same store, in poisoned memory."""
    allocator = PoisoningAllocator(store._allocator.pages, store._rows)
    store._allocator = store._tables.allocator = allocator
    return store


class DeferredCopy:
    """A copy that lies still until it is waited for."""

    def __init__(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = (destination, source)

    def done(self) -> bool:
        return self._pending is None

    def wait(self) -> None:
        if self._pending is not None:
            destination, source = self._pending
            destination.copy_(source)
            self._pending = None

    def wait_on_device(self) -> None:
        self.wait()


class DeferredLink:
    """Copies happen when ``complete`` says so, in order of start, or when they are waited for.

    A copy that is waited for overtakes older ones: harsher than a stream, so that nothing but the
    store's own waiting keeps its memory in order.
    """

    def __init__(self) -> None:
        self._started: deque[DeferredCopy] = deque()

    @property
    def pending(self) -> int:
        return sum(not copy.done() for copy in self._started)

    def complete(self, count: int) -> None:
        """Performs the ``count`` oldest pending copies."""
        while count and self._started:
            copy = self._started.popleft()
            count -= not copy.done()
            copy.wait()

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> DeferredCopy:
        copy = DeferredCopy(destination, source)
        self._started.append(copy)
        return copy

    def read(self, size: int) -> Finished:
        return Finished()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in every bit."""
    same_kind = left.shape == right.shape and left.dtype == right.dtype
    return same_kind and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )
