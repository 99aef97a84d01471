"""A decode step through all layers of a shard in one call of the native kernels."""

from collections.abc import Sequence
from ctypes import CDLL, Structure, byref, c_double, c_float, c_int, c_int64, c_void_p

import torch

from workers.backends.cpu.shared import CHUNK, FORMATS, LANES, PARTIAL
from workers.backends.stopwatch import Stopwatch
from workers.budget.pages import PAGE_TOKENS
from workers.kv.pool import PagedBatch, PagedLayers, PagedStep
from workers.kv.rows import row_format
from workers.model.config import ModelConfig
from workers.model.operations import HeadNorms, LayerWeights
from workers.model.rope import Rotation

# What decode_layers adds up its seconds by.
_SPENT = ("gemm", "attention", "elementwise")

_NAMES = (
    *("input_norm", "qkv", "qkv_bias", "query_norm", "key_norm", "output", "output_bias"),
    *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias"),
)


class _Weights(Structure):
    """``layer_weights`` of layers.c."""

    _fields_ = (*((name, c_void_p) for name in _NAMES), ("rotates", c_int64))


class _HeadNorms(Structure):
    """``head_norms`` of kernels.h."""

    _fields_ = (("query", c_void_p), ("key", c_void_p), ("epsilon", c_float))


def head_norms(norms: HeadNorms | None) -> _HeadNorms:
    """``norms`` as the kernels take them; its tensors must outlive it."""
    return (
        _HeadNorms(norms.query.data_ptr(), norms.key.data_ptr(), norms.epsilon) if norms else _HeadNorms()
    )


class PagedCache(Structure):
    """``paged_cache`` of kernels.h; of several layers, where there are."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "pages", "lengths", "starts")),
        *((name, c_int64) for name in ("width", "chunks", "row_bytes")),
        *((name, c_int) for name in ("format", "page_tokens")),
    )


NOTHING = PagedCache(None, None, None, None, 0, 0, 0, 0, PAGE_TOKENS)


def paged_cache(cache: PagedBatch | PagedStep | PagedLayers | None) -> PagedCache:
    """``cache`` as the kernels take it; its tensors must outlive it."""
    if cache is None:
        return NOTHING
    tensors = (cache.rows, cache.pages, cache.lengths, cache.starts)
    pointers = (None if each is None else each.data_ptr() for each in tensors)
    chunks = -(-int(cache.lengths.max()) // CHUNK)
    row_bytes = cache.rows.stride(0) * cache.rows.dtype.itemsize
    form = FORMATS[row_format(cache.rows.dtype).name]
    return PagedCache(*pointers, cache.pages.shape[-1], chunks, row_bytes, form, cache.page_tokens)


def whole_vectors(head_size: int, rows: torch.dtype) -> bool:
    """Whether the numbers of a head in rows of that type are whole vectors."""
    return head_size % (LANES * (8 // min(8, row_format(rows).bits))) == 0


class _Shape(Structure):
    """``layer_shape`` of layers.c."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "intermediate")),
        *((name, c_int) for name in ("heads", "kv_heads", "head_size")),
        ("epsilon", c_float),
    )


class NativeDecode:
    """See ``FusedDecode``."""

    def __init__(
        self,
        library: CDLL,
        layers: Sequence[LayerWeights],
        model: ModelConfig,
        dtype: torch.dtype,
        activations: torch.dtype,
        max_rows: int,
        stopwatch: Stopwatch,
    ) -> None:
        self._decode = library.decode_layers
        self._decode.restype = None
        self._decode.argtypes = (*(c_void_p,) * 13, *(c_int64,) * 2, *(c_int,) * 3)
        self._layers = layers  # Their memory must outlive the addresses below.
        self._model, self._dtype, self._activations = model, dtype, activations
        self.max_rows, self._stopwatch = max_rows, stopwatch
        self._weights = (_Weights * len(layers))(*(_addresses(layer) for layer in layers))
        sizes = (len(layers), model.hidden, model.intermediate)
        heads = (model.heads, model.kv_heads, model.head_size)
        self._shape = _Shape(*sizes, *heads, model.norm_epsilon)

    def __call__(
        self, hidden: torch.Tensor, rotation: Rotation, step: PagedStep, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A copy, as it is changed.
        hidden = torch.empty(hidden.shape).copy_(hidden)
        cos, sin = (part.contiguous() for part in rotation)
        sequences, slots = len(hidden), step.recent_slots
        caches = [paged_cache(each) for each in (step, step.recent, step.spilled)]
        scratch = torch.empty(self._scratch(sequences, sum(cache.chunks for cache in caches), tail))
        shares = torch.empty(len(self._layers), sequences, self._model.kv_heads, tail)
        seconds = (c_double * len(_SPENT))()
        self._decode(
            *(self._weights, byref(self._shape)),
            *(each.data_ptr() for each in (hidden, cos, sin)),
            *map(byref, caches),
            *(step.slots.data_ptr(), None if slots is None else slots.data_ptr()),
            *(each.data_ptr() for each in (scratch, shares)),
            seconds,
            *(sequences, tail),
            *(int(each == torch.bfloat16) for each in (self._activations, self._dtype)),
            torch.get_num_threads(),
        )
        for what, spent in zip(_SPENT, seconds, strict=True):
            self._stopwatch.seconds[what] += spent
        return hidden.to(self._activations), shares

    def _scratch(self, sequences: int, chunks: int, tail: int) -> int:
        """Floats of activations of ``sequences`` rows, and what the attention needs."""
        model = self._model
        heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
        row = model.hidden + 3 * heads + 2 * kv_heads + 3 * model.intermediate + model.heads * tail
        return sequences * (row + chunks * model.heads * (model.head_size + PARTIAL))


def _addresses(layer: LayerWeights) -> _Weights:
    tensors = (getattr(layer, name) for name in _NAMES)
    return _Weights(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), layer.rotates)
