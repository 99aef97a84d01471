"""Any plan that a policy could make, and wilder ones."""

from dataclasses import replace

from hypothesis import strategies as st

from workers.budget.observation import RowAttention
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.full import FullKnobs, plan_full
from workers.policies.h2o import H2OKnobs, plan_h2o
from workers.policies.policy import Target
from workers.policies.streaming import StreamingKnobs, plan_streaming


@st.composite
def pyramid_plans(draw: st.DrawFn, layers: int, most_prompt: int) -> KeepPlan:
    """Counts as of the pyramid policy, without its schedule: layers need not be in any order."""
    prompt = draw(st.integers(1, most_prompt))
    kept = draw(st.tuples(*[st.integers(1, prompt)] * layers))
    chunk = draw(st.integers(1, 24))
    prunes = draw(st.booleans())  # then a hidden state serves all heads
    return KeepPlan(
        prompt_tokens=prompt,
        kept=kept,
        recent=1,
        heads=draw(st.sampled_from(("mean", "max") if prunes else ("each", "mean", "max"))),
        drops_hidden_states=prunes,
        generation=GenerationPlan(
            chunk=chunk,
            window=draw(st.integers(1, 24)),
            start=kept,
            keeps=draw(st.tuples(*[st.integers(0, chunk)] * layers).filter(any)),
            observes=RowAttention(rows=1, newest=draw(st.sampled_from((0.5, 1.0, 3.0)))),
        ),
    )


@st.composite
def with_recall(draw: st.DrawFn, plan: st.SearchStrategy[KeepPlan]) -> KeepPlan:
    """The same plan, as recall may have it: with drafts, or an index of keys, or both."""
    return replace(draw(plan), drafts=draw(st.sampled_from((0, 0, 1, 7))), indexes=draw(st.booleans()))


def streaming_plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    knobs = st.builds(StreamingKnobs, sinks=st.integers(0, 20), window=st.integers(1, 40))
    return st.builds(plan_streaming, _targets(layers, most_prompt), knobs)


def h2o_plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    ratios = st.floats(0, 0.5)
    heads = st.sampled_from(("each", "all"))
    knobs = st.builds(
        H2OKnobs, heavy_ratio=ratios, recent_ratio=ratios, drop=st.sampled_from((1, 5, 16)), heads=heads
    )
    return st.builds(plan_h2o, _targets(layers, most_prompt), knobs)


def full_plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    return st.builds(plan_full, _targets(layers, most_prompt), st.just(FullKnobs()))


def _targets(layers: int, most_prompt: int) -> st.SearchStrategy[Target]:
    return st.builds(Target, st.integers(1, most_prompt), st.just(layers))


def plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    """A plan of any policy."""
    return st.one_of(
        pyramid_plans(layers, most_prompt),
        streaming_plans(layers, most_prompt),
        h2o_plans(layers, most_prompt),
        full_plans(layers, most_prompt),
    )
