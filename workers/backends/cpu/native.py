"""The kernels in C, on CPUs, for weights and KV in fp32 and bf16."""

from collections.abc import Sequence
from ctypes import CDLL, byref, c_float, c_int, c_int64, c_void_p

import torch
from torch.nn import functional

from workers.backends.cpu.fused import NativeDecode, head_norms, paged_cache, whole_vectors
from workers.backends.cpu.shared import CHUNK, COLUMNS, LANES, PARTIAL
from workers.backends.interface import Attended, FusedDecode
from workers.backends.reference import ReferenceBackend
from workers.backends.stopwatch import Stopwatch
from workers.backends.tuning import ReferenceTuning
from workers.device import multiplies_bf16
from workers.kv.pool import PagedBatch
from workers.kv.rows import row_format
from workers.model.config import ModelConfig
from workers.model.operations import HeadNorms, LayerWeights
from workers.model.rope import Rotation

# Products of at most this many rows are bound by reading the weights, which torch's do with less speed.
FEW_ROWS = 64
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

CPU = torch.device("cpu")
_POINTER, _SIZE, _INT = c_void_p, c_int64, c_int
_ARGUMENTS = {
    "linear": (*(_POINTER,) * 4, *(_SIZE,) * 3, *(_INT,) * 3),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, c_float, *(_INT,) * 3),
    "silu_product": (_POINTER, _POINTER, _SIZE, _SIZE, _INT, _INT),
    "rotate": (*(_POINTER,) * 6, _SIZE, *(_INT,) * 6),
    "prefill_attention": (*(_POINTER,) * 7, *(_SIZE,) * 4, *(_INT,) * 7),
    "indexed_shares": (*(_POINTER,) * 5, *(_SIZE,) * 2, *(_INT,) * 7),
    "decode_attention": (*(_POINTER,) * 9, *(_SIZE,) * 2, *(_INT,) * 5),
}


class CpuBackend:
    """See ``Backend``. For tensors in host memory.

    Where the processor does not multiply bf16, activations are fp32 beside bf16 weights and KV: nothing
    is then rounded, or widened again, between two operations.
    """

    name = "cpu"

    def __init__(
        self, library: CDLL, dtype: torch.dtype, tuning: ReferenceTuning = ReferenceTuning()
    ) -> None:
        """``dtype``, of weights and KV, is one of NATIVE_DTYPES; ``tuning``: of what has no kernel here."""
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.prefill_scratch.argtypes = (_SIZE, _SIZE, *(_INT,) * 5)
        library.prefill_scratch.restype = _SIZE
        self._library = library
        self._dtype = dtype
        self.activations = dtype if multiplies_bf16(CPU) else torch.float32
        self._reference = ReferenceBackend(self.activations, tuning)
        self.stopwatch = Stopwatch()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        with self.stopwatch.on("gemm"):
            if x.dtype == torch.bfloat16:
                return functional.linear(x, weight, bias)
            if self._few(x, weight):
                return self._product(x, weight, bias)
            return functional.linear(x, weight.float(), None if bias is None else bias.float())

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with self.stopwatch.on("gemm"):
            if self._few(x, weight):
                return self._product(x, weight, None)
            return self._reference.logits(x, weight.to(x.dtype))

    def _few(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the native product can be had, and is worth it."""
        return len(x) <= FEW_ROWS and len(weight) % COLUMNS == 0

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As ``linear``, in fp32."""
        (rows, size), columns = x.shape, len(weight)
        x, out = x.contiguous(), torch.empty(rows, columns)
        pointers = (0 if each is None else each.data_ptr() for each in (x, weight, bias, out))
        self._library.linear(*pointers, rows, columns, size, *self._mode())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        with self.stopwatch.on("elementwise"):
            self._library.rms_norm(
                x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, epsilon, *self._mode()
            )
        return out

    def silu_product(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        bf16, _, threads = self._mode()
        with self.stopwatch.on("elementwise"):
            self._library.silu_product(gate_up.data_ptr(), out.data_ptr(), rows, size, bf16, threads)
        return out

    def rotate(
        self,
        projected: torch.Tensor,
        rotation: Rotation | None,
        heads: int,
        kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projected = projected.contiguous()
        rows, _, head_size = projected.shape
        query = projected.new_empty(rows, heads, head_size)
        kv = torch.empty(rows, 2, kv_heads, head_size, dtype=self._dtype)
        turned = [part.contiguous() for part in rotation or ()]
        with self.stopwatch.on("elementwise"):
            self._library.rotate(
                *(projected.data_ptr(), byref(head_norms(norms))),
                *((part.data_ptr() for part in turned) if turned else (None, None)),
                *(query.data_ptr(), kv.data_ptr()),
                *(rows, heads, kv_heads, head_size, *self._mode()),
            )
        return query, kv

    def prefill_attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        weights: torch.Tensor,
        context: int,
        starts: torch.Tensor | None = None,
        greatest: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if query.shape[-1] % LANES:  # No whole number of vectors.
            return self._reference.prefill_attention(query, kv, weights, context, starts, greatest)
        query, kv = query.contiguous(), kv.contiguous()
        (rows, heads, head_size), (tokens, _, kv_heads, _) = query.shape, kv.shape
        out = query.new_empty(rows, heads * head_size)
        scratch = torch.empty(self._prefill_scratch(tokens, len(weights), heads, kv_heads, head_size))
        scores = torch.zeros(kv_heads, context)
        tensors = (query, kv, weights, starts, out, scratch, scores)
        pointers = (0 if each is None else each.data_ptr() for each in tensors)
        with self.stopwatch.on("attention"):
            self._library.prefill_attention(
                *(*pointers, rows, tokens, len(weights), context),
                *(heads, kv_heads, head_size, greatest, *self._mode()),
            )
        return out, scores

    def low_counts(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        context: int,
        starts: torch.Tensor | None,
        each: bool,
    ) -> torch.Tensor:
        return self._reference.low_counts(query, kv, context, starts, each)

    def decode_attention(self, query: torch.Tensor, batch: PagedBatch, tail: int) -> Attended:
        stored = [each.rows.dtype for each in (batch, batch.recent, batch.spilled) if each]
        if not all(whole_vectors(query.shape[-1], dtype) for dtype in stored):
            return self._reference.decode_attention(query, batch, tail)
        query = query.contiguous()
        sequences, heads, head_size = query.shape
        caches = [paged_cache(each) for each in (batch, batch.recent, batch.spilled)]
        out = query.new_empty(sequences, heads * head_size)
        parts = sequences * sum(cache.chunks for cache in caches) * heads
        partials = torch.empty(parts * (head_size + PARTIAL))
        logits = torch.empty(sequences * heads * tail)
        shares = torch.empty(sequences, batch.rows.shape[2], tail)
        lse = torch.empty(sequences, heads)
        bf16, _, threads = self._mode()
        with self.stopwatch.on("attention"):
            self._library.decode_attention(
                *(query.data_ptr(), *map(byref, caches)),
                *(each.data_ptr() for each in (out, partials, logits, shares, lse)),
                *(sequences, tail, heads, batch.rows.shape[2], head_size, bf16, threads),
            )
        return Attended(out, lse, shares)

    def indexed_shares(self, query: torch.Tensor, index: PagedBatch, counts: torch.Tensor) -> torch.Tensor:
        if query.shape[-1] % LANES:
            return self._reference.indexed_shares(query, index, counts)
        query = query.contiguous()
        sequences, heads, head_size = query.shape
        most, form = int(counts.max()), row_format(index.rows.dtype)
        width = -(-most // LANES) * LANES
        bf16, _, threads = self._mode()
        logits, shares = torch.empty(sequences * heads * width), torch.empty(sequences, width)
        with self.stopwatch.on("attention"):
            self._library.indexed_shares(
                *(query.data_ptr(), byref(paged_cache(index)), counts.data_ptr()),
                *(logits.data_ptr(), shares.data_ptr(), sequences, width),
                *(heads, index.rows.shape[2], head_size),
                *(form.keys_per_row, form.index_scale_rows, bf16, threads),
            )
        return shares[:, :most]

    def fuse(
        self, layers: Sequence[LayerWeights], model: ModelConfig, stored: torch.dtype
    ) -> FusedDecode | None:
        if (
            not whole_vectors(model.head_size, stored)
            or model.hidden % COLUMNS
            or model.intermediate % COLUMNS
        ):
            return None
        return NativeDecode(
            self._library, layers, model, self._dtype, self.activations, FEW_ROWS, self.stopwatch
        )

    def linear_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        widens = rows > FEW_ROWS and self._dtype != self.activations
        return columns * size * 4 if widens else 0

    def logits_scratch_bytes(self, rows: int, columns: int, size: int) -> int:
        if self.activations == torch.float32:
            return self.linear_scratch_bytes(rows, columns, size)
        return self._reference.logits_scratch_bytes(rows, columns, size)

    def prefill_scratch_bytes(self, model: ModelConfig, rows: int, tokens: int, window: int) -> int:
        if model.head_size % LANES:
            return self._reference.prefill_scratch_bytes(model, rows, tokens, window)
        sizes = (model.heads, model.kv_heads, model.head_size)
        return 4 * self._prefill_scratch(tokens, min(rows, window), *sizes)

    def _prefill_scratch(self, tokens: int, window: int, heads: int, kv_heads: int, head_size: int) -> int:
        """Words of scratch of ``prefill_attention``."""
        bf16, _, threads = self._mode()
        words: int = self._library.prefill_scratch(
            tokens, window, heads, kv_heads, head_size, bf16, threads
        )
        return words

    def decode_scratch_bytes(self, model: ModelConfig, sequences: int, stored: torch.dtype) -> int:
        if not whole_vectors(model.head_size, stored):
            return self._reference.decode_scratch_bytes(model, sequences, stored)
        # Partial sums, the newest tokens' apart, and the logits and attention of all that is scored: of a
        # whole cache at most.
        chunks = -(-model.context // CHUNK) + 1
        partials = chunks * model.heads * (model.head_size + PARTIAL)
        return sequences * (partials + model.context * (model.heads + model.kv_heads)) * 4

    def _mode(self) -> tuple[int, int, int]:
        """Whether activations are bf16, whether weights and KV are, and how many threads there are."""
        bf16 = torch.bfloat16
        return int(self.activations == bf16), int(self._dtype == bf16), torch.get_num_threads()
