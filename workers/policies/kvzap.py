"""What a repetition of the text would look at, whatever is asked (KVzap, arXiv 2601.07891).

KVzip (Kim et al., arXiv 2505.23416) has the model repeat a text and scores a token by the most attention
that it gets from that; KVzip+ times what its value adds to the output. A gate foresees this score by the
token's own key and value, so that nothing is read twice: see ``gates.py``, and ``bench/repeated.py`` for
how gates are trained.

Other than in the authors' code: gates are linear in features of keys and values; a layer keeps as many
tokens as were asked for, the same number in each head, and not those above a threshold; and the newest that
stay in any case are fewer where little stays. With ``window_size`` the prompt's newest rows look as well,
as in ``defensive``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.budget.observation import KeysValues, RowAttention
from workers.budget.plan import KeepPlan
from workers.policies.capacity import capacities, half_at_most, keep_prompt, same_share, sets
from workers.policies.defensive import added
from workers.policies.observed import Observed, best
from workers.policies.policy import Policy, Target, heads_knob, knob

if TYPE_CHECKING:
    import torch

# First tokens, which stay in any case.
SINKS = 4


@dataclass(frozen=True)
class KVzapKnobs:
    """The window by the name of the released code; it is 128 there."""

    compression_ratio: float = knob(0.5, "[0, 1)", "share of the prompt that goes", counts=True)
    sliding_window_size: int = knob(32, "[1, ...)", "newest tokens, which stay")
    window_size: int = knob(0, "[0, ...)", "newest rows whose attention counts too; 0: whatever is asked")
    heads: str = heads_knob("each")


def plan_kvzap(target: Target, knobs: KVzapKnobs) -> KeepPlan:
    """The counts for one prompt; of generated tokens that leave the window a layer keeps the same share."""
    usual = int(target.prompt_tokens * (1 - knobs.compression_ratio))
    counts = capacities(target, usual, SINKS + 1)
    generation = same_share(target, counts, knobs.sliding_window_size, KeysValues())
    recent = half_at_most(knobs.sliding_window_size, target, counts, SINKS)
    looks = RowAttention(rows=knobs.window_size, over_rows="max") if knobs.window_size else KeysValues()
    return keep_prompt(target, counts, recent, SINKS, looks, sets(knobs.heads), generation)


def choose(observed: Observed, tokens: int, keep: int, knobs: KVzapKnobs) -> "torch.Tensor":
    """Keeps what is foreseen to get most, or has got it from the window: both are the most of any row."""
    assert observed.kv is not None
    assert observed.gate is not None
    scores = observed.over_heads(observed.gate(observed.kv).exp())
    if observed.attention is not None:
        seen = observed.attention * observed.over_heads(added(observed, tokens))
        scores = seen.maximum(scores)
    return best(observed, scores, keep)


POLICY = Policy(
    "kvzap",
    "1",
    "what a repetition of the text would look at, whatever is asked (KVzap, arXiv 2601.07891)",
    KVzapKnobs,
    plan_kvzap,
    choose,
    calibrates=True,
    gated=True,
)
