"""What a model's steps have to do at least. Pure."""

from dataclasses import dataclass

from workers.budget.plan import KeepPlan
from workers.model.config import ModelConfig


@dataclass(frozen=True)
class Limits:
    """Bytes read a second, and floating point operations a second in products of many rows."""

    read_bytes_per_second: float
    flops_per_second: float


def prefill_flops(plan: KeepPlan, model: ModelConfig) -> int:
    """Floating point operations of one prompt's products and attention, in rows that are computed."""
    heads, kv_heads = model.heads * model.head_size, model.kv_heads * model.head_size
    flops = 0
    for layer in range(model.layers):
        rows = plan.kept[layer] if plan.drops_hidden_states else plan.prompt_tokens
        more = layer + 1 < model.layers
        going_on = (plan.kept[layer + 1] if plan.drops_hidden_states else rows) if more else 1
        flops += 2 * rows * model.hidden * (heads + 2 * kv_heads)
        flops += 2 * rows * rows * heads  # half of all pairs, twice: with keys and with values
        flops += 2 * going_on * model.hidden * (heads + 3 * model.intermediate)
    return flops


def weights_read(model: ModelConfig) -> int:
    """Weights that a decode step reads, each of which is multiplied once with each row."""
    per_layer = model.hidden * model.head_size * (2 * model.heads + 2 * model.kv_heads)
    layers = model.layers * (per_layer + 3 * model.hidden * model.intermediate)
    return layers + model.vocabulary * model.hidden
