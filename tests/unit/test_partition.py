"""The split of layers: no other would leave the costliest shard cheaper."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.partition import boundaries, layer_costs
from pyramidserve.types import Compression
from workers.model.config import ModelConfig
from workers.model.shapes import SHAPES

# LLaMA-2-7B; its head is small beside its layers.
MODEL = replace(
    SHAPES["llama-2-7b"],
    context=4096,
    dtype="float16",
)
FULL = Compression()
PYRAMIDS = [Compression("pyramid", prefill, kv_keep=0.45) for prefill in ("prune", "evict")]


def sizes(model: ModelConfig, compression: Compression, shards: int) -> list[int]:
    cuts = boundaries(*layer_costs(model, compression), shards)
    return [end - first for first, end in pairwise((0, *cuts, model.layers))]


def shard_costs(costs: Sequence[float], head_cost: float, cuts: Sequence[int]) -> list[float]:
    """What each shard costs, as a share of the whole."""
    shards = [sum(costs[first:end]) for first, end in pairwise((0, *cuts, len(costs)))]
    shards[-1] += head_cost
    return shards


@given(
    st.lists(st.integers(1, 50).map(float), min_size=1, max_size=8),
    st.integers(0, 100).map(float),
    st.data(),
)
def test_no_other_cut_makes_the_costliest_shard_cheaper(
    costs: list[float], head_cost: float, data: st.DataObject
) -> None:
    shards = data.draw(st.integers(1, len(costs)))
    cuts = boundaries(costs, head_cost, shards)
    assert len(cuts) == shards - 1
    assert all(first < end for first, end in pairwise((0, *cuts, len(costs))))
    every = combinations(range(1, len(costs)), shards - 1)
    best = min(max(shard_costs(costs, head_cost, other)) for other in every)
    assert max(shard_costs(costs, head_cost, cuts)) == best


@pytest.mark.parametrize("compression", [FULL, *PYRAMIDS])
def test_costs_are_shares_of_one_whole(compression: Compression) -> None:
    costs, head_cost = layer_costs(MODEL, compression)
    assert len(costs) == MODEL.layers
    assert min(*costs, head_cost) > 0
    assert sum(costs) + head_cost == pytest.approx(1)
    assert sum(shard_costs(costs, head_cost, (3, 9))) == pytest.approx(1)


def test_layers_cost_the_same_where_they_keep_the_same() -> None:
    costs, _ = layer_costs(MODEL, FULL)
    assert len(set(costs)) == 1
    assert sizes(replace(MODEL, vocabulary=100), FULL, 4) == [8, 8, 8, 8]


@pytest.mark.parametrize("shards", [2, 3, 4, 6])
@pytest.mark.parametrize("compression", PYRAMIDS)
def test_a_pyramid_puts_fewer_layers_in_the_first_shard(compression: Compression, shards: int) -> None:
    first, *_, last = sizes(replace(MODEL, vocabulary=4000), compression, shards)
    assert first < last


@pytest.mark.parametrize("compression", [FULL, *PYRAMIDS])
def test_a_heavy_head_takes_layers_from_the_last_shard(compression: Compression) -> None:
    light = sizes(MODEL, compression, 2)
    heavy = sizes(replace(MODEL, vocabulary=10_000_000), compression, 2)
    assert heavy[1] < light[1]
    assert heavy[0] > heavy[1]


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
@pytest.mark.parametrize("compression", [FULL, *PYRAMIDS])
def test_shards_cost_about_the_same(compression: Compression, shards: int) -> None:
    costs, head_cost = layer_costs(MODEL, compression)
    loads = shard_costs(costs, head_cost, boundaries(costs, head_cost, shards))
    assert max(loads) <= 1 / shards + max(costs)


def test_a_short_context_is_compared_at_its_own_length() -> None:
    costs, _ = layer_costs(replace(MODEL, context=128), PYRAMIDS[0])
    # At 128 tokens the minimum context leaves all layers but the first alike.
    assert costs[0] > costs[1]
    assert len(set(costs[1:])) == 1
