"""Device memory that steps need beside weights and KV pool, for as long as they run."""

from workers.kernels.interface import Kernels
from workers.model.config import ModelConfig
from workers.model.llama import MLP_ROWS


def prefill_workspace_bytes(
    model: ModelConfig, kernels: Kernels, rows: int, surviving: int, window: int, itemsize: int
) -> int:
    """Activations alive at the fullest point of a prefill of ``rows`` tokens, ``window`` of which score.

    In attention: the hidden state, projections, rotations, rotated queries and keys, and the output;
    with them either the kernel's scratch, or the stored KV and the output that survives. In the MLP,
    which takes MLP_ROWS of the ``surviving`` rows at a time: the hidden state before and after
    attention, and of some rows the normed state, gate and up, and their product or a widened weight.
    ``itemsize`` is that of KV.
    """
    each = kernels.activations.itemsize
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
    inputs = rows * (model.hidden + 3 * heads + kv_heads + 2 * model.head_size) * each
    inputs += rows * 2 * kv_heads * itemsize
    stored = rows * 2 * kv_heads * itemsize + surviving * heads * each
    scratch = kernels.prefill_scratch_bytes(model, rows, window)
    states = (rows + surviving) * model.hidden * each
    some = min(surviving, MLP_ROWS)
    widened = kernels.linear_scratch_bytes(some, 2 * model.intermediate, model.hidden)
    product = some * model.intermediate * each
    mlp = some * (model.hidden + 2 * model.intermediate) * each + max(widened, product)
    return max(inputs + max(stored, scratch), states + mlp)


def decode_workspace_bytes(model: ModelConfig, kernels: Kernels, sequences: int) -> int:
    """The scratch of a decode step's attention, and the logits of ``sequences`` sequences."""
    logits = sequences * model.vocabulary * (kernels.activations.itemsize + 4)
    widened = kernels.linear_scratch_bytes(sequences, model.vocabulary, model.hidden)
    return kernels.decode_scratch_bytes(model, sequences) + logits + widened
