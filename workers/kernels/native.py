"""The kernels in C, on CPUs, in fp32 and bf16."""

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p

import torch
from torch.nn import functional
from torch.profiler import record_function

from workers.kernels.torch_kernels import TorchKernels
from workers.kv.pool import PagedBatch
from workers.model.config import ModelConfig
from workers.model.dtype import multiplies_bf16
from workers.model.rope import Rotation

# Products of at most this many rows are bound by reading the weights, which torch's do with less speed.
FEW_ROWS = 64
# Tokens that one thread attends to at a time: CHUNK of kernels.c.
CHUNK = 256
# Values that the attention takes at a time: heads of no multiple of them are left to torch.
LANES = 16
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

_POINTER, _SIZE, _INT = c_void_p, c_int64, c_int
_ARGUMENTS = {
    "linear": (*(_POINTER,) * 5, *(_SIZE,) * 3, _INT, _INT),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, c_float, _INT, _INT),
    "silu_product": (_POINTER, _POINTER, _SIZE, _SIZE, _INT, _INT),
    "rotate": (*(_POINTER,) * 5, _SIZE, *(_INT,) * 5),
    "decode_attention": (*(_POINTER,) * 8, *(_SIZE,) * 4, *(_INT,) * 5),
}


class NativeKernels:
    """See ``Kernels``. For tensors in host memory of one of NATIVE_DTYPES."""

    def __init__(self, library: CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library
        self._multiplies_bf16 = multiplies_bf16()
        self._reference = TorchKernels()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with record_function("linear"):
            if x.dtype == torch.bfloat16 and self._multiplies_bf16:
                return functional.linear(x, weight, bias)
            if len(x) <= FEW_ROWS and len(weight) % 2 == 0:
                return self._linear_of_few_rows(x.contiguous(), weight, bias)
            if x.dtype == torch.float32:
                return functional.linear(x, weight, bias)
            bias = None if bias is None else bias.float()
            return functional.linear(x.float(), weight.float(), bias).to(x.dtype)

    def _linear_of_few_rows(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        (rows, size), columns = x.shape, len(weight)
        out = x.new_empty(rows, columns)
        scratch = torch.empty(rows, size)
        pointers = (0 if each is None else each.data_ptr() for each in (x, weight, bias, out, scratch))
        self._library.linear(*pointers, rows, columns, size, *_mode(x))
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, epsilon, *_mode(x)
        )
        return out

    def silu_product(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._library.silu_product(gate_up.data_ptr(), out.data_ptr(), rows, size, *_mode(gate_up))
        return out

    def rotate(
        self, projected: torch.Tensor, rotation: Rotation, heads: int, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projected = projected.contiguous()
        rows, _, head_size = projected.shape
        query = projected.new_empty(rows, heads, head_size)
        kv = projected.new_empty(rows, 2, kv_heads, head_size)
        cos, sin = (part.contiguous() for part in rotation)
        pointers = (each.data_ptr() for each in (projected, cos, sin, query, kv))
        self._library.rotate(*pointers, rows, heads, kv_heads, head_size, *_mode(projected))
        return query, kv

    def decode_attention(
        self, query: torch.Tensor, batch: PagedBatch, tail: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if query.shape[-1] % LANES:
            return self._reference.decode_attention(query, batch, tail)
        query = query.contiguous()
        sequences, heads, head_size = query.shape
        bf16, threads = _mode(query)
        chunks = -(-int(batch.lengths.max()) // CHUNK)
        out = query.new_empty(sequences, heads * head_size)
        partials = torch.empty(sequences * chunks * heads * (head_size + LANES + 1))
        logits = torch.empty(sequences * heads * tail)
        shares = torch.empty(sequences, tail)
        tensors = (query, batch.rows, batch.pages, batch.lengths, out, partials, logits, shares)
        self._library.decode_attention(
            *(each.data_ptr() for each in tensors),
            *(sequences, batch.pages.shape[1], chunks, tail),
            *(heads, batch.rows.shape[2], head_size, bf16, threads),
        )
        return out, shares

    def decode_scratch_bytes(self, model: ModelConfig, sequences: int, itemsize: int) -> int:
        # Partial sums, and the logits of what has been generated and not compressed: at most as many.
        chunks = -(-model.context // CHUNK)
        return sequences * chunks * model.heads * (model.head_size + LANES + 1) * 4


def _mode(x: torch.Tensor) -> tuple[int, int]:
    """The last two arguments of every kernel: whether values are bf16, and how many threads."""
    return int(x.dtype == torch.bfloat16), torch.get_num_threads()
