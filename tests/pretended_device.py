"""A device that is not there: tensors in host memory that say they are on it, and refuse to be mixed.

As on CUDA, an operation on tensors of both fails, unless it copies one to the other, or takes rows of the
device's by indices of the host's, which then waits. What would be launched there and waited for is counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
# What takes no work of a device.
_VIEWS = """
    view select slice unsqueeze squeeze transpose permute expand t as_strided split split_with_sizes unbind
    alias detach _unsafe_view _reshape_alias unfold chunk lift_fresh is_same_size
    empty new_empty empty_like empty_strided new_empty_strided
"""
VIEWS = frozenset(re.findall(r"\w+", _VIEWS))
# Whose result has a shape that the host must be told.
SHAPED_BY_CONTENT = frozenset(("nonzero", "masked_select", "_unique2", "unique_dim"))
INDEXING = frozenset(("index", "index_put_", "_index_put_impl_", "_unsafe_index"))
# "launches", "syncs", for which the host waits, and "copies" from the host.
counts: Counter[str] = Counter()
_composite: dict[Any, bool] = {}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both devices."""


class OnDevice(torch.Tensor):
    """A tensor that pretends."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.host})"

    def tolist(self) -> Any:
        counts["syncs"] += 1
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Pretending(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Also catches what is made on the device without any tensor of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[None]:
    """Lets torch make tensors on DEVICE."""
    with torch.inference_mode(), _Pretending():  # type: ignore[no-untyped-call]
        yield


def _run(function: Any, arguments: Any, options: Any) -> Any:
    if function not in _composite:
        _composite[function] = torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), "CompositeImplicitAutograd"
        )
    if _composite[function]:
        with _Pretending():  # type: ignore[no-untyped-call]
            return function.decompose(*arguments, **options)
    name = function.overloadpacket.__name__
    tensors = [*_tensors(arguments), *_tensors(options.values())]
    on_device = any(isinstance(each, OnDevice) for each in tensors)
    on_host = any(not isinstance(each, OnDevice) and each.dim() for each in tensors)
    if on_device and on_host:
        _check_mixture(function, name, arguments, tensors)
    wanted = options.get("device")
    to_device = on_device if wanted is None else torch.device(wanted).type == NAME
    if to_device or on_device:
        _count(name, arguments, on_device, to_device)
    result = _compute(function, arguments, options, to_device)
    if name.endswith("_") and not name.endswith("__"):
        return arguments[0]
    if options.get("out") is not None:
        return options["out"]
    if not to_device or name in ("_local_scalar_dense", "equal"):
        return result
    return _mapped(torch.Tensor, OnDevice, result)


def _check_mixture(function: Any, name: str, arguments: Any, tensors: list[torch.Tensor]) -> None:
    indices = _tensors(arguments[1]) if name in INDEXING else ()
    by_host = isinstance(arguments[0], OnDevice) and not any(isinstance(i, OnDevice) for i in indices)
    if name in ("copy_", "_to_copy") or (name in INDEXING and by_host):
        return
    where = ", ".join(f"{each.device.type} {tuple(each.shape)}" for each in tensors)
    raise MixedDevicesError(f"{function} on tensors of both devices: {where}")


def _count(name: str, arguments: Any, on_device: bool, to_device: bool) -> None:
    def host_indices() -> bool:
        return any(i.dtype == torch.bool or not isinstance(i, OnDevice) for i in _tensors(arguments[1]))

    def between() -> bool:
        return isinstance(arguments[0], OnDevice) != isinstance(arguments[1], OnDevice)

    if name in ("_local_scalar_dense", "equal") or name in SHAPED_BY_CONTENT:
        counts["syncs"] += 1
    elif name == "_to_copy" and on_device != to_device:
        counts["copies" if to_device else "syncs"] += 1
    elif name == "copy_" and between():
        counts["copies"] += 1
    elif name in INDEXING and host_indices():
        counts["syncs"] += 1
    if name not in VIEWS:
        counts["launches"] += 1


def _compute(function: Any, arguments: Any, options: Any, to_device: bool) -> Any:
    """Does it in host memory."""

    def host(leaf: OnDevice) -> torch.Tensor:
        return leaf.host

    arguments = _mapped(OnDevice, host, arguments)
    options = {key: _mapped(OnDevice, host, value) for key, value in options.items()}
    if to_device and "device" in options:
        options["device"] = torch.device("cpu")
    if function is aten.mm.dtype:  # which only GPUs have
        first, second, dtype = arguments
        return torch.mm(first.to(dtype), second.to(dtype))
    return function(*arguments, **options)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(kind: type[Any], change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with all of ``kind`` in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(kind, change, each) for each in value)
    return value
