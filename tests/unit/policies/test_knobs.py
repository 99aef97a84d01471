"""Knobs that make no sense are refused by name and value, before anything runs."""

import math
from typing import Any

import pytest

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Parameter
from workers.policies.registry import BUILT_IN, plan, policy_name
from workers.policies.valid import validate

BAD_PYRAMID: list[tuple[str, Any]] = [
    ("recent_ratio", -0.1),
    ("recent_ratio", 1.0),
    ("recent_ratio", math.nan),
    ("prefill_decay_ratio", 0.0),
    ("prefill_decay_ratio", 1.1),
    ("prefill_decay_strategy", "linear"),
    ("min_context_length", -1),
    ("min_context_length", 0.5),
    ("recent_ratio", True),
    ("recent_ratio", "much"),
    ("layerwise_downsample_interval", 0),
    ("streamingllm_sink_len", -1),
    ("distance_weight", 0.0),
    ("distance_weight", math.inf),
    ("exceed_length_to_compress", 0),
    ("gen_compress_ratio", 0.0),
    ("gen_compress_ratio", 1.5),
    ("gen_decay_ratio", math.nan),
    ("gen_decay_ratio", 2.0),
]
BAD_COMPRESSION: list[tuple[Compression, str, str]] = [
    (Compression("h3o"), "policy", "'h3o'"),
    (Compression("full", parameters={"tokens": 5}), "tokens 5", "'full'"),
    (Compression("h2o", kv_keep=0.4, parameters={"tokens": 5}), "kv_keep 0.4", "tokens 5"),
    (Compression("h2o", kv_keep=0.4, parameters={"heavy_ratio": 0.1}), "kv_keep 0.4", "heavy_ratio"),
    (Compression("h2o", parameters={"tokens": 5, "recent_ratio": 0.1}), "tokens 5", "recent_ratio"),
    *(
        (Compression("tova", parameters={"tokens": tokens}), "tokens", f"{tokens}")
        for tokens in (0, -1, 1.5, True, math.nan, math.inf, "many", (), (3, 0), (3, 1.5))
    ),
    (Compression("snapkv", parameters={"heads": "some"}), "heads", "'some'"),
    (Compression("pyramid", parameters={"heads": "each"}), "heads", "'each'"),
    (Compression("pyramid", "prune", 0.4, parameters={"heads": "each"}), "heads", "'prune'"),
    (Compression("full", kv_keep=0.5), "kv_keep", "0.5"),
    (Compression("pyramid", "skip"), "prefill", "'skip'"),
    *((Compression("pyramid", kv_keep=keep), "kv_keep", f"{keep}") for keep in (0.0, -1.0, 1.01, math.nan)),
    (Compression("pyramid", kv_keep=0.4, parameters={"recent_ratio": 0.2}), "kv_keep", "0.4"),
    (Compression("streaming", kv_keep=0.4, parameters={"sinks": 4}), "kv_keep", "0.4"),
    (Compression("full", parameters={"recent_ratio": 0.2}), "recent_ratio", "'full'"),
    (Compression("pyramid", parameters={"sinks": 4}), "sinks", "'pyramid'"),
    (Compression("pyramid", parameters={"recent_rate": 4}), "recent_rate", "'recent_ratio' is"),
    (Compression("streaming", parameters={"sinks": -1}), "sinks", "-1"),
    (Compression("streaming", parameters={"window": 0}), "window", "0"),
    *((Compression("pyramid", parameters={name: value}), name, f"{value}") for name, value in BAD_PYRAMID),
]


@pytest.mark.parametrize(("compression", "name", "value"), BAD_COMPRESSION)
def test_a_wrong_knob_is_refused_by_name_and_value(compression: Compression, name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(compression)
    assert name in refused.value.message
    assert value in refused.value.message


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {
            "recent_ratio": 0,
            "prefill_decay_ratio": 1,
            "prefill_decay_strategy": "cosine",
            "min_context_length": 0,
            "layerwise_downsample_interval": 1,
            "streamingllm_sink_len": 0,
            "distance_weight": 1e6,
            "exceed_length_to_compress": 1.0,
            "gen_compress_ratio": 1.0,
            "gen_decay_ratio": 1.0,
        },
        {"recent_ratio": 0.999, "prefill_decay_ratio": 1e-9, "gen_decay_ratio": 1e-9},
    ],
)
@pytest.mark.parametrize("prompt_tokens", [1, 2, 100])
def test_knobs_at_their_limits_are_taken(parameters: dict[str, Parameter], prompt_tokens: int) -> None:
    compression = Compression("pyramid", "prune", parameters=parameters)
    validate(compression)
    kept = plan(compression, prompt_tokens, 12).kept
    assert kept[0] == prompt_tokens
    assert min(kept) >= 1


def test_every_policy_works_without_knobs() -> None:
    for policy in BUILT_IN:
        validate(Compression(policy.name))
        keep = plan(Compression(policy.name), 100, 3)
        assert 1 <= min(keep.kept) <= max(keep.kept) <= 100


EVICTING = [policy.name for policy in BUILT_IN if not policy.keeps_all]


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize(
    ("tokens", "kept"), [(30, (30,) * 3), (300, (100,) * 3), ((50, 20, 120), (50, 20, 100))]
)
def test_every_policy_that_evicts_keeps_as_many_tokens_as_are_asked_for(
    policy: str, tokens: int | tuple[int, ...], kept: tuple[int, ...]
) -> None:
    compression = Compression(policy, "evict" if policy == "pyramid" else "", parameters={"tokens": tokens})
    validate(compression)
    assert plan(compression, 100, 3).kept == kept
    with pytest.raises(InvalidRequestError, match="2 counts for the 3 layers"):
        plan(Compression(policy, parameters={"tokens": [5, 6]}), 100, 3)


def test_counts_of_prune_fall_with_depth_and_spare_its_first_layer() -> None:
    assert plan(Compression("pyramid", parameters={"tokens": 30}), 100, 3).kept == (100, 30, 30)
    with pytest.raises(InvalidRequestError, match="20 for layer 1 and 40 for the next"):
        plan(Compression("pyramid", parameters={"tokens": [50, 20, 40]}), 100, 3)


def test_a_full_cache_keeps_every_token_in_every_layer() -> None:
    assert plan(Compression(), 100, 3).kept == (100, 100, 100)
    assert plan(Compression(), 100, 3).tokens(2, 50) == 150


def test_a_policy_is_named_with_its_prefill_where_there_is_a_choice() -> None:
    assert policy_name(Compression("pyramid", "evict")) == "pyramid/evict"
    assert policy_name(Compression("streaming", "evict")) == "streaming"
