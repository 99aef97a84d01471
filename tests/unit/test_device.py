"""Devices that are there, devices that are not, and what is asked of a GPU's runtime."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pyramidserve.errors import ConfigurationError
from workers.device import (
    device_memory,
    device_of_rank,
    free_bytes,
    multiplies_bf16,
    open_device,
    select_rows,
    to_device,
)
from workers.engine.choose import choose_dtype
from workers.kv import link

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "device is 'gpu', which torch does not know; give 'cpu' or 'cuda'"),
        ("cuda", f"device is 'cuda', but torch {torch.__version__} finds no CUDA device; .* or give 'cpu'"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_the_way_out(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=said.replace("+", r"\+")):
        open_device(name)


def test_shards_take_the_gpus_that_they_see_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    mine: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", mine.append)
    assert [device_of_rank("cuda", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of_rank("cuda:1", 0) == "cuda:1"
    assert device_of_rank("cpu", 3) == "cpu"
    assert open_device("cuda") == torch.device("cuda:0")
    assert open_device("cuda:1") == GPU
    assert mine == [torch.device("cuda:0"), GPU]
    with pytest.raises(ConfigurationError, match="'cuda:2', but there are 2 CUDA devices"):
        open_device("cuda:2")


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(
    capability: tuple[int, int], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # counts emulation
    assert choose_dtype("auto", GPU) is chosen
    assert multiplies_bf16(GPU) is (chosen is torch.bfloat16)


def test_what_the_allocator_keeps_for_this_process_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes": {"all": {"current": 30, "peak": 70}}}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    assert free_bytes(GPU) == 120
    assert (device_memory(GPU).allocated, device_memory(GPU).peak) == (30, 70)
    assert (device_memory(CPU).allocated, device_memory(CPU).peak) == (0, 0)
    assert free_bytes(CPU) > 0


def test_on_a_cpu_nothing_is_copied() -> None:
    values = np.arange(5)
    assert to_device(values, CPU).data_ptr() == values.ctypes.data
    rows = torch.randn(7, 2, 3)
    index = torch.tensor([6, 0, 6])
    assert torch.equal(select_rows(rows, index), rows[index])


@dataclass
class FakeRuntime:
    """A CUDA runtime that pins what it is told to, or not."""

    status: int = 0

    class cudaError:  # noqa: N801  # as the runtime calls it
        success = 0

    def __post_init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.status:
            self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.pinned[address]


def cuda_link(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> link.CudaLink:
    def stream(device: torch.device) -> Any:
        return None

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    return link.CudaLink(GPU)


def test_host_memory_is_pinned_to_the_byte_and_for_as_long_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime()
    memory = cuda_link(runtime, monkeypatch).host_memory((3, 5), torch.float32)
    assert runtime.pinned == {memory.data_ptr(): 60}
    part = memory[1]
    del memory
    assert len(runtime.pinned) == 1
    del part
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"host_bytes is 60, .* cannot be pinned \(2\); give less"):
        cuda_link(FakeRuntime(status=2), monkeypatch).host_memory((3, 5), torch.float32)
