"""Device memory that steps need beside weights and KV pool, for as long as they run."""

import torch

from workers.backends.interface import Backend
from workers.model.config import ModelConfig


def prefill_workspace_bytes(
    model: ModelConfig,
    kernels: Backend,
    rows: int,
    surviving: int,
    window: int,
    itemsize: int,
    block_rows: int,
) -> int:
    """Activations alive at the fullest point of a prefill of ``rows`` tokens, ``window`` of which score.

    Of all rows: hidden states, rotations, keys and values, and the attention's output. With them, of a
    block of rows, either what attention needs, its projections or its queries and scratch; or what the MLP
    needs, the normed state, gate and up, and their product or a widened weight. Or, where rows are dropped,
    the ``surviving`` ones once more. ``itemsize`` is that of KV before it is stored.
    """
    each = kernels.activations.itemsize
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size

    def attention(block: int, tokens: int) -> int:
        rotated = block * (heads * each + 2 * kv_heads * itemsize)
        projected = block * (heads + 2 * kv_heads) * each
        scratch = kernels.prefill_scratch_bytes(model, block, tokens, window) + block * heads * each
        return rotated + max(projected, scratch)

    whole = rows * ((model.hidden + heads) * each + 2 * kv_heads * itemsize + model.head_size * 4)
    block, rest = min(rows, block_rows), rows % block_rows
    widened = kernels.linear_scratch_bytes(block, 2 * model.intermediate, model.hidden)
    mlp = block * (model.hidden + 2 * model.intermediate) * each
    mlp += max(widened, block * model.intermediate * each)
    dropping = surviving * (heads + model.hidden) * each
    return whole + max(attention(block, rows - rest), attention(rest, rows), mlp, dropping)


def decode_workspace_bytes(
    model: ModelConfig, kernels: Backend, sequences: int, stored: torch.dtype
) -> int:
    """The scratch of a decode step's attention, and the logits of ``sequences`` sequences."""
    logits = sequences * model.vocabulary * 4
    widened = kernels.logits_scratch_bytes(sequences, model.vocabulary, model.hidden)
    return kernels.decode_scratch_bytes(model, sequences, stored) + logits + widened


def step_workspace_bytes(
    model: ModelConfig,
    kernels: Backend,
    longest: int,
    sequences: int,
    itemsize: int,
    stored: torch.dtype,
    block_rows: int,
) -> int:
    """The most that a prefill of ``longest`` rows and a decode between its blocks allocate together.

    ``stored``: the type of the rows of KV.
    """
    prefill = prefill_workspace_bytes(model, kernels, longest, longest, longest, itemsize, block_rows)
    return prefill + decode_workspace_bytes(model, kernels, sequences, stored)
