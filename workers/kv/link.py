"""The way between device and host memory: every copy of KV in either direction goes through here."""

import time
import weakref
from typing import Protocol

import torch

from pyramidserve.errors import ConfigurationError


class Copy(Protocol):
    """A copy under way."""

    def done(self) -> bool:
        """Whether the destination holds the data."""

    def wait(self) -> None:
        """Returns when the destination holds the data."""

    def wait_on_device(self) -> None:
        """Lets what the device is given to compute from now on find the data in the destination.

        Returns at once where that is another processor; the source may still be read.
        """


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

    def wait_on_device(self) -> None:
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

    def wait_on_device(self) -> None:
        self.wait()


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
    """A copy on the copy stream of ``device``."""

    def __init__(self, source: torch.Tensor, event: torch.cuda.Event, device: torch.device) -> None:
        self._source: torch.Tensor | None = source
        self._event, self._device = event, device

    def done(self) -> bool:
        if self._event.query():  # type: ignore[no-untyped-call]
            self._source = None
        return self._source is None

    def wait(self) -> None:
        self._event.synchronize()
        self._source = None

    def wait_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


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
        return CudaCopy(source, event, self._device)

    def read(self, size: int) -> Copy:
        return Finished()  # attention that reads it has copied it itself

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype)
        # torch's own allocator of pinned memory would take the next power of two.
        if memory.nbytes and (failure := _pin(memory)):
            raise ConfigurationError(
                f"host_bytes is {memory.nbytes}, but so much memory cannot be pinned ({failure}); "
                "give less, or raise the limit of locked memory (ulimit -l)"
            )
        return memory


def _pin(memory: torch.Tensor) -> str:
    """Pins ``memory`` for as long as it is there; says what went wrong, or nothing."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.data_ptr()
    status = runtime.cudaHostRegister(address, memory.nbytes, 0)
    if status != runtime.cudaError.success:
        return str(status)
    # When the process ends, the driver lets go of it.
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address).atexit = False
    return ""


def link_for(device: torch.device) -> HostLink:
    """The link of ``device``."""
    return CudaLink(device) if device.type == "cuda" else MemoryLink()
