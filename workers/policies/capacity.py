"""Plans of policies that hold a layer to a capacity, of the prompt and while tokens are generated. Pure."""

from itertools import pairwise

from pyramidserve.errors import InvalidRequestError
from workers.budget.observation import Heads, KeysValues, Observation, RowAttention
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.policy import Target

# Generated tokens that are compressed, or dropped, at once where no knob says it.
CHUNK = 16


def capacities(target: Target, usual: int, least: int = 1) -> tuple[int, ...]:
    """Tokens that each layer holds: as many as were asked for, or ``usual``; never below ``least``."""
    counts = target.tokens or target.wanted or (usual,) * target.layers
    return tuple(max(count, least) for count in counts)


def asked_counts(target: Target) -> tuple[int, ...]:
    """Tokens that each layer keeps where that was asked for; raises InvalidRequestError where none can."""
    assert target.wanted is not None
    kept = target.wanted
    if not target.prunes:
        return kept
    for layer, (count, deeper) in enumerate(pairwise(kept[1:]), 1):
        if deeper > count:
            raise InvalidRequestError(
                f"tokens has {count} for layer {layer} and {deeper} for the next; prefill 'prune' drops "
                "hidden states, so that no layer keeps more than the one before it: ask for prefill 'evict'"
            )
    return (target.prompt_tokens, *kept[1:])


def keep_prompt(
    target: Target,
    counts: tuple[int, ...],
    recent: int,
    sinks: int = 0,
    observes: Observation | None = None,
    heads: Heads = "mean",
    generation: GenerationPlan | None = None,
) -> KeepPlan:
    """So many tokens of the prompt stay in each layer, of them the newest and first so many in any case."""
    kept = tuple(min(count, target.prompt_tokens) for count in counts)
    recent = min(recent, *kept)
    wanted = target.wanted
    return KeepPlan(
        prompt_tokens=target.prompt_tokens,
        kept=kept,
        recent=recent,
        sinks=min(sinks, target.prompt_tokens - recent),
        observes=observes,
        heads=heads,
        drops_hidden_states=target.prunes,
        generation=generation,
        bound_by="sinks" if wanted is not None and sum(kept) > sum(wanted) else "",
    )


def hold(
    target: Target,
    counts: tuple[int, ...],
    recent: int,
    drop: int,
    sinks: int = 0,
    observes: RowAttention | KeysValues | None = None,
    heads: Heads = "mean",
) -> KeepPlan:
    """As ``keep_prompt``; and whenever ``drop`` tokens more are there than a layer holds, as many go."""
    generation = GenerationPlan(
        chunk=drop,
        window=max(0, min(counts) - target.prompt_tokens),
        start=(0,) * target.layers,
        keeps=(0,) * target.layers,
        observes=observes,
        rechooses=True,
        recent=recent,
        sinks=sinks,
    )
    return keep_prompt(target, counts, recent, sinks, observes, heads, generation)


def same_share(
    target: Target, counts: tuple[int, ...], window: int, observes: RowAttention | KeysValues
) -> GenerationPlan:
    """Of generated tokens that leave the ``window`` a layer keeps the share that it keeps of the prompt."""
    kept = tuple(min(count, target.prompt_tokens) for count in counts)
    keeps = tuple(max(1, round(CHUNK * count / target.prompt_tokens)) for count in kept)
    return GenerationPlan(chunk=CHUNK, window=window, start=kept, keeps=keeps, observes=observes)


def half_at_most(recent: int, target: Target, counts: tuple[int, ...], sinks: int) -> int:
    """``recent``, or so few that every layer chooses half of what it keeps beside the sinks."""
    return max(1, min(recent, (min(*counts, target.prompt_tokens) - sinks + 1) // 2))


def sets(heads: str) -> Heads:
    """Whose tokens stay, as the knob of policies says it."""
    return "each" if heads == "each" else "mean"
