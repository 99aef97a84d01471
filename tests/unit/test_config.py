"""What a deployment may say: each setting by its name, of its type, in its range."""

import math
from typing import Any

import pytest

from cluster.admit.tuning import AdmitTuning
from cluster.config import ClusterConfig, parse_config
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import ConfigurationError
from pyramidserve.types import Compression
from workers.schedule.tuning import ScheduleTuning


def test_no_settings_are_the_defaults() -> None:
    config = parse_config({})
    assert config == ClusterConfig()
    assert config.compression == Compression("pyramid", "prune", kv_keep=0.45)


def test_settings_are_taken_as_they_are() -> None:
    config = parse_config(
        {
            "model": "somewhere",
            "dtype": "float16",
            "shards": 3,
            "cpus_per_shard": 2,
            "router_port": 0,
            "compression": {"policy": "streaming", "parameters": {"sinks": 2, "window": 30}},
        }
    )
    assert (config.model, config.dtype, config.shards, config.router_port) == ("somewhere", "float16", 3, 0)
    assert config.cpus_per_shard == 2
    assert config.compression == Compression("streaming", parameters={"sinks": 2, "window": 30})


def test_knobs_of_the_pyramid_are_settings_too() -> None:
    compression = {
        "policy": "pyramid",
        "prefill": "evict",
        "kv_keep": None,
        "parameters": {"recent_ratio": 0},
    }
    expected = Compression("pyramid", "evict", parameters={"recent_ratio": 0})
    assert parse_config({"compression": compression}).compression == expected


def test_what_suits_another_machine_better_is_a_setting_of_its_room() -> None:
    config = parse_config({"admit": {"patience": 9, "roomiest": 8}, "route": {"messages_per_core": 500.0}})
    assert config.admit == AdmitTuning(patience=9, roomiest=8)
    assert config.route == RouteTuning(messages_per_core=500.0)


def test_the_scheduler_is_tuned_by_settings_too() -> None:
    tuning = parse_config({"schedule": {"cohort_prefills": 4, "busy_slice": 2}}).schedule
    assert tuning == ScheduleTuning(cohort_prefills=4, busy_slice=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"shard": 2}, ("shard", "shards")),
        ({"compression": {"policy": "full", "keep": 1}}, ("compression.keep", "kv_keep")),
        ({"compression": {"policy": "pyramid", "parameters": {"ratio": 1}}}, ("compression", "'ratio'")),
        ({"shards": "2"}, ("shards", "'2'", "int")),
        ({"shards": 2.0}, ("shards", "2.0", "int")),
        ({"shards": True}, ("shards", "True", "int")),
        ({"shards": None}, ("shards", "None", "int")),
        ({"cpus_per_shard": "1"}, ("cpus_per_shard", "'1'", "float")),
        ({"model": 7}, ("model", "7", "text")),
        ({"compression": "pyramid"}, ("compression", "'pyramid'", "mapping")),
        ({"compression": None}, ("compression", "None", "mapping")),
        ({"compression": {"kv_bytes_keep": 2.0}}, ("compression", "kv_bytes_keep is 2.0", "(0, 1]")),
        ({"compression": {"policy": "auto"}}, ("compression", "'auto'", "kv_bytes_keep")),
        ({"compression": {"kv_keep": "0.45"}}, ("compression.kv_keep", "'0.45'", "float")),
        (
            {"compression": {"policy": "pyramid", "parameters": {"min_context_length": 0.5}}},
            ("compression", "min_context_length", "0.5", "whole"),
        ),
        ({"dtype": "int8"}, ("dtype", "'int8'", "bfloat16")),
        ({"kv_dtype": "int2"}, ("kv_dtype", "'int2'", "int4")),
        ({"host_kv_dtype": "fp8"}, ("host_kv_dtype", "'fp8'", "float32")),
        ({"device": "tpu"}, ("device", "'tpu'", "cuda")),
        ({"backend": "mkl"}, ("backend", "'mkl'", "reference")),
        ({"admit": 4}, ("admit", "4", "mapping")),
        ({"admit": {"patients": 4}}, ("admit.patients", "patience")),
        ({"admit": {"lookahead": 1.5}}, ("admit.lookahead", "1.5", "int")),
        ({"admit": {"patience": -1}}, ("admit.patience is -1", "finite and 0 or more")),
        ({"admit": {"patience": math.inf}}, ("admit.patience is inf", "finite and 0 or more")),
        ({"admit": {"lookahead": -1}}, ("admit.lookahead is -1", "0 or more")),
        ({"admit": {"horizon": 0}}, ("admit.horizon is 0", "(0, 1]")),
        ({"admit": {"length_share": 1.5}}, ("admit.length_share is 1.5", "(0, 1]")),
        ({"admit": {"roomiest": 0}}, ("admit.roomiest is 0", "1 or more")),
        ({"admit": {"affinity": math.nan}}, ("admit.affinity is nan", "[0, 1]")),
        ({"route": {"messages_per_core": 0}}, ("route.messages_per_core is 0", "finite and above 0")),
        ({"route": {"longest_spacing": -1}}, ("route.longest_spacing is -1", "finite and 0 or more")),
        ({"route": {"refusal_pause": 0.0}}, ("route.refusal_pause is 0.0", "finite and above 0")),
        ({"schedule": {"slice": 2}}, ("schedule.slice", "quiet_slice")),
        ({"schedule": {"cohort_prefills": 0}}, ("cohort_prefills is 0", "1 or more")),
        ({"schedule": {"cohort_prefills": 1.5}}, ("schedule.cohort_prefills", "1.5", "int")),
        ({"schedule": {"quiet_slice": 0}}, ("quiet_slice is 0", "above 0")),
        ({"schedule": {"busy_slice": math.inf}}, ("busy_slice is inf", "finite")),
        ({"schedule": {"newest_verification": 1.5}}, ("newest_verification is 1.5", "(0, 1]")),
        ({"schedule": {"verification_steps": -1}}, ("verification_steps is -1", "above 0")),
        ({"execute": {"block_rows": 0}}, ("block_rows is 0", "1 or more")),
        ({"reference": {"gather_bytes": 0}}, ("gather_bytes is 0", "1 or more")),
        ({"router_port": 65536}, ("router_port", "65536", "65535")),
        ({"router_port": -1}, ("router_port", "-1", "65535")),
        ({"compression": {"policy": "h3o"}}, ("compression", "'h3o'")),
        ({"compression": {"policy": "pyramid", "kv_keep": 1.5}}, ("compression", "kv_keep is 1.5")),
        ({"compression": {"policy": "pyramid", "kv_keep": math.nan}}, ("compression", "kv_keep is nan")),
    ],
)
def test_a_wrong_setting_is_refused_by_name(arguments: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_config(arguments)
    assert all(words in refused.value.message for words in named)


@pytest.mark.parametrize(
    "name", ["pipelines", "shards", "kv_bytes", "max_sequences", "max_prefill_tokens", "threads"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_what_must_be_there_is_at_least_one(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value}; it must be 1 or more"):
        parse_config({name: value})
    assert getattr(parse_config({name: 1}), name) == 1


@pytest.mark.parametrize("name", ["host_bytes", "max_model_len", "cpus_per_shard", "gpus_per_shard"])
def test_what_may_be_absent_is_not_negative(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is -1; it must be finite and 0 or more"):
        parse_config({name: -1})
    assert getattr(parse_config({name: 0}), name) == 0


@pytest.mark.parametrize("name", ["stall_seconds", "session_max_age"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_must_pass_is_finite_and_positive(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value}; it must be finite and above 0"):
        parse_config({name: value})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pipelines": 3, "max_pipelines": 2}, "max_pipelines is 2 and pipelines is 3"),
        ({"target_pressure": 0.0}, "target_pressure is 0.0"),
        ({"target_pressure": 1.5}, "target_pressure is 1.5"),
        ({"scale_down_seconds": -1.0}, "scale_down_seconds is -1.0"),
    ],
)
def test_bounds_of_the_autoscaler_make_sense(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        parse_config(settings)
