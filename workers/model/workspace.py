"""Device memory that steps need beside weights and KV pool, for as long as they run."""

from workers.model.attention import SCORE_ROWS
from workers.model.config import ModelConfig


def prefill_workspace_bytes(
    model: ModelConfig, rows: int, surviving: int, scored: bool, itemsize: int
) -> int:
    """Activations alive at the fullest point of a prefill of ``rows`` tokens.

    In attention: the hidden state, projections, rotations, rotated queries and keys; with them either
    the scores of the recent window, or the output, twice, and the stored KV. In the MLP, which
    ``surviving`` rows reach: the hidden state before and after attention, gate and up, and their
    product.
    """
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
    inputs = rows * (model.hidden + 2 * heads + 3 * kv_heads + 2 * model.head_size) * itemsize
    output = (rows * (heads + 2 * kv_heads) + surviving * heads) * itemsize
    scores = 3 * min(SCORE_ROWS, rows) * rows * model.heads * 4 if scored else 0
    mlp = rows * model.hidden + surviving * (model.hidden + 3 * model.intermediate)
    return max(inputs + max(output, scores), mlp * itemsize)


def decode_workspace_bytes(model: ModelConfig, sequences: int, scratch: int, itemsize: int) -> int:
    """The ``scratch`` of a decode step's attention, and the logits of ``sequences`` sequences."""
    return scratch + sequences * model.vocabulary * (itemsize + 4)
