"""The counts of a plan are those of a cache that is filled and compressed step by step."""

from hypothesis import given
from hypothesis import strategies as st

from workers.budget.plan import GenerationPlan, KeepPlan


@st.composite
def plans(draw: st.DrawFn) -> KeepPlan:
    chunk = draw(st.integers(1, 20))
    kept = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=3)))
    keeps = tuple(draw(st.integers(0, chunk)) for _ in kept)
    generation = GenerationPlan(chunk, draw(st.integers(0, 40)), start=kept, keeps=keeps)
    return KeepPlan(30, kept, recent=1, generation=draw(st.sampled_from((generation, None))))


def simulate(plan: KeepPlan, layer: int, generated: int) -> list[int]:
    """Tokens held after 0, 1, … ``generated`` tokens."""
    held = plan.kept[layer]
    uncompressed = 0
    history = [held]
    for _ in range(generated):
        held, uncompressed = held + 1, uncompressed + 1
        rule = plan.generation
        if rule is not None and uncompressed == rule.window + rule.chunk:
            held -= rule.chunk - rule.keeps[layer]
            uncompressed -= rule.chunk
        history.append(held)
    return history


@given(plans())
def test_tokens_held_are_those_of_a_simulation(plan: KeepPlan) -> None:
    for layer in range(len(plan.kept)):
        counted = [plan.tokens(layer, generated) for generated in range(121)]
        assert counted == simulate(plan, layer, 120)


def test_the_fraction_is_taken_over_all_layers() -> None:
    assert KeepPlan(10, (10, 6, 2), recent=1).fraction == 0.6
