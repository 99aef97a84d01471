"""Device memory that steps need beside weights and KV pool, for as long as they run."""

from workers.model.attention import GATHER_BYTES, SCORE_ROWS
from workers.model.config import ModelConfig


def prefill_workspace_bytes(
    model: ModelConfig, rows: int, surviving: int, scored: bool, itemsize: int
) -> int:
    """Activations alive at the fullest point of a prefill of ``rows`` tokens.

    In attention: the hidden state, projections, rotations, rotated queries and keys; with them either
    the scores of the recent window, or the output, twice, and the stored KV. In the MLP, which
    ``surviving`` rows reach: the hidden state before and after attention, gate and up, the activated
    gate, and its product with up.
    """
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
    inputs = rows * (model.hidden + 2 * heads + 3 * kv_heads + 2 * model.head_size) * itemsize
    output = (rows * (heads + 2 * kv_heads) + surviving * heads) * itemsize
    scores = 3 * min(SCORE_ROWS, rows) * rows * model.heads * 4 if scored else 0
    mlp = rows * model.hidden + surviving * (model.hidden + 4 * model.intermediate)
    return max(inputs + max(output, scores), mlp * itemsize)


def decode_workspace_bytes(model: ModelConfig, sequences: int, itemsize: int) -> int:
    """What a decode step of ``sequences`` gathers of one layer at once, and the logits behind the last.

    Keys and values are gathered, and one of them at a time is copied in the order of the product.
    """
    longest = model.context * 2 * model.kv_heads * model.head_size * itemsize
    logits = sequences * model.vocabulary * (itemsize + 4)
    return max(GATHER_BYTES, longest) * 3 // 2 + logits


def workspace_bytes(model: ModelConfig, prefill_rows: int, sequences: int, itemsize: int) -> int:
    """The most that any step of a shard needs; a prompt as long as the context is prefilled alone."""
    longest = max(prefill_rows, model.context)
    return max(
        prefill_workspace_bytes(model, longest, longest, True, itemsize),
        decode_workspace_bytes(model, sequences, itemsize),
    )
