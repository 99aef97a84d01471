"""Any plan that a policy could make, and wilder ones."""

from dataclasses import replace

from hypothesis import strategies as st

from pyramidserve.types import Compression, StreamingParameters
from workers.budget.plan import GenerationPlan, KeepPlan
from workers.policies.full import plan_full
from workers.policies.streaming import plan_streaming


@st.composite
def pyramid_plans(draw: st.DrawFn, layers: int, most_prompt: int) -> KeepPlan:
    """Counts as of the pyramid policy, without its schedule: layers need not be in any order."""
    prompt = draw(st.integers(1, most_prompt))
    kept = draw(st.tuples(*[st.integers(1, prompt)] * layers))
    chunk = draw(st.integers(1, 24))
    return KeepPlan(
        prompt_tokens=prompt,
        kept=kept,
        recent=1,
        distance_weight=draw(st.sampled_from((0.5, 1.0, 3.0))),
        drops_hidden_states=draw(st.booleans()),
        generation=GenerationPlan(
            chunk=chunk,
            window=draw(st.integers(1, 24)),
            start=kept,
            keeps=draw(st.tuples(*[st.integers(0, chunk)] * layers).filter(any)),
        ),
    )


@st.composite
def with_recall(draw: st.DrawFn, plan: st.SearchStrategy[KeepPlan]) -> KeepPlan:
    """The same plan, as recall may have it: with drafts, or an index of keys, or both."""
    return replace(draw(plan), drafts=draw(st.sampled_from((0, 0, 1, 7))), indexes=draw(st.booleans()))


def streaming_plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    parameters = st.builds(StreamingParameters, sinks=st.integers(0, 20), window=st.integers(1, 40))
    compression = st.builds(Compression, st.just("streaming"), streaming=parameters)
    return st.builds(plan_streaming, compression, st.integers(1, most_prompt), st.just(layers))


def full_plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    return st.builds(plan_full, st.just(Compression()), st.integers(1, most_prompt), st.just(layers))


def plans(layers: int, most_prompt: int) -> st.SearchStrategy[KeepPlan]:
    """A plan of any policy."""
    return st.one_of(
        pyramid_plans(layers, most_prompt),
        streaming_plans(layers, most_prompt),
        full_plans(layers, most_prompt),
    )
