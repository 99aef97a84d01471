"""The way between device and host memory: every copy of KV in either direction goes through here."""

import time
from typing import Protocol

import torch


class Copy(Protocol):
    """A copy under way."""

    def done(self) -> bool:
        """Whether the destination holds the data."""

    def wait(self) -> None:
        """Returns when the destination holds the data."""


class HostLink(Protocol):
    """Copies between device and host memory, in the order in which they were started."""

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Copy:
        """Starts to overwrite ``destination`` with ``source``; keeps ``source`` alive until done."""

    def read(self, size: int) -> Copy:
        """Takes note that ``size`` bytes of host memory are attended to where they lie."""

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that this link reaches fast, not initialised."""


class Finished:
    """A copy that was done when it was started."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


class MemoryLink:
    """Host and device are the same memory: a copy is done at once."""

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Copy:
        destination.copy_(source)
        return Finished()

    def read(self, size: int) -> Copy:
        return Finished()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


class PacedCopy:
    """A copy that counts as done at a certain time."""

    def __init__(self, due: float) -> None:
        self._due = due

    def done(self) -> bool:
        return time.perf_counter() >= self._due

    def wait(self) -> None:
        time.sleep(max(0.0, self._due - time.perf_counter()))


class PacedLink(MemoryLink):
    """Host memory as far away as behind a bus: what is copied or read arrives as late as over that.

    On a CPU, where both are the same memory, this is what makes the cost of recall honest.
    """

    def __init__(self, bytes_per_second: float, latency: float) -> None:
        """``latency`` is in seconds."""
        self._bytes_per_second, self._latency = bytes_per_second, latency
        self._free = 0.0
        self.moved = 0

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Copy:
        destination.copy_(source)
        return self.read(source.nbytes)

    def read(self, size: int) -> Copy:
        self.moved += size
        self._free = max(self._free, time.perf_counter()) + size / self._bytes_per_second
        return PacedCopy(self._free + self._latency)


class CudaCopy:
    """A copy on the copy stream."""

    def __init__(self, source: torch.Tensor, event: torch.cuda.Event) -> None:
        self._source: torch.Tensor | None = source
        self._event = event

    def done(self) -> bool:
        if self._event.query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None

    def wait(self) -> None:
        self._event.synchronize()
        self._source = None


class CudaLink:
    """Pinned host memory and a copy stream beside the compute stream. Has not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, destination: torch.Tensor, source: torch.Tensor) -> Copy:
        # What the compute stream has written so far must be there before it is copied.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        for tensor in (destination, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        return CudaCopy(source, event)

    def read(self, size: int) -> Copy:
        return Finished()  # attention that reads it has copied it itself

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def link_for(device: torch.device) -> HostLink:
    """The link of ``device``."""
    return CudaLink(device) if device.type == "cuda" else MemoryLink()
