"""The methods of the field keep what other people's code keeps, on the embedded model in fp32.

Recorded with kvpress 0.5.5, and with a program that agrees with H2O's own code. `make fuzz` takes all.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fuzz import FACTOR

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest

# Two prompts' cases that travel with the tests, as they were recorded.
SMALL = Path(__file__).parents[1] / "data" / "recorded_selection.json"
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("snapkv", {}),
    "snapkv_w16": ("snapkv", {"window_size": 16}),
    "streaming_llm": ("streaming", {}),
    "tova": ("tova", {}),
    "keydiff": ("keydiff", {}),
    "expected_attention": ("expected_attention", {}),
}
# H2O's choices whose last winner and first loser were closer, in millionths, are compared by count.
FRAGILE = 100


@pytest.fixture(scope="module")
def engine(embedded: Path) -> Engine:
    return Engine(
        EngineConfig(
            checkpoint=str(embedded),
            dtype="float32",
            boundaries=(11,),
            kv_bytes=512 << 20,
            host_bytes=512 << 20,
            max_sequences=1,
        )
    )


@cache
def recording(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def positions(coded: str | list[str], tokens: int, head: int) -> set[int]:
    """Of one head: a bitmap in hexadecimal digits, or one for each head."""
    digits = coded if isinstance(coded, str) else coded[head]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:tokens]).tolist())


def each_head(layers: Sequence[npt.NDArray[np.int32]]) -> list[tuple[int, int, set[int]]]:
    """Layer, KV head and what it has."""
    return [
        (layer, head, set(own.tolist()))
        for layer, sets in enumerate(layers)
        for head, own in enumerate(np.broadcast_to(sets, (3, sets.shape[1])))
    ]


def check_press(engine: Engine, prompt: list[int], case: dict[str, Any]) -> None:
    policy, parameters = PRESSES[case["press"]]
    compression = Compression(policy, parameters={**parameters, "tokens": case["kept_count"]})
    request = EngineRequest(prompt, stopping=Stopping(1), compression=compression, trace=True)
    (traced,) = engine.trace([request])
    assert traced.traced is not None
    wrong = compared = 0
    for layer, head, own in each_head([p for shard in traced.traced.shards for p in shard.positions]):
        recorded = case["kept"] if isinstance(case["kept"], str) else case["kept"][layer]
        ties = set(case.get("ambiguous", {}).get(f"{layer}.{head}", []))
        theirs = positions(recorded, len(prompt), head)
        assert len(own) == len(theirs)
        compared += len(theirs - ties)
        wrong += len(theirs - ties - own)
    assert compared > 80 * case["kept_count"]
    assert wrong <= 0.001 * compared


def check_h2o(engine: Engine, prompt: list[int], case: dict[str, Any]) -> None:
    parameters = {"heavy_ratio": case["heavy_ratio"], "recent_ratio": case["recent_ratio"], "drop": 1}
    # The last token is not fed any more.
    stopping = Stopping(65, ignore_eos=True)
    compression = Compression("h2o", parameters=parameters)
    (traced,) = engine.trace(
        [EngineRequest(prompt, stopping=stopping, compression=compression, trace=True)]
    )
    assert traced.traced is not None
    assert list(traced.reply.token_ids[:64]) == case["greedy64"]
    prefilled = [p for shard in traced.traced.shards for p in shard.positions]
    for moment, gaps, fed, layers in (
        ("after_prefill", "min_gap_prefill_e6", 0, prefilled),
        ("after_64", "min_gap_64_e6", 64, traced.positions),
    ):
        wrong = compared = 0
        for layer, head, own in each_head(layers):
            theirs = positions(case[moment][layer], len(prompt) + fed, head)
            assert len(own) == len(theirs) == case["heavy"] + case["recent"]
            if case[gaps][layer][head] >= FRAGILE:
                compared += len(theirs)
                wrong += len(theirs - own)
        assert compared > 60 * (case["heavy"] + case["recent"])
        assert wrong <= 0.001 * compared


def prompts_of(reference: Path) -> dict[str, list[int]]:
    prompts: dict[str, list[int]] = recording(reference)["prompts"]
    return prompts


@pytest.mark.parametrize("press", PRESSES)
def test_the_press_that_travels_along_is_met(engine: Engine, press: str) -> None:
    found = recording(SMALL)
    (case,) = [case for case in found["cases"] if case["press"] == press]
    check_press(engine, found["prompts"][case["prompt"]], case)


def test_the_h2o_that_travels_along_is_met(engine: Engine) -> None:
    found = recording(SMALL)
    (case,) = found["h2o"]
    check_h2o(engine, found["prompts"][case["prompt"]], case)


@pytest.mark.parametrize("press", PRESSES)
def test_recorded_presses_are_met(engine: Engine, press: str, reference_file: Path) -> None:
    cases = recording(reference_file.with_name("kv_selection.json"))["cases"]
    chosen = [case for case in cases if case["press"] == press]
    assert len(chosen) == 6
    for case in chosen:
        if FACTOR > 1 or case["prompt"] == "pydoc_777":
            check_press(engine, prompts_of(reference_file)[case["prompt"]], case)


def test_recorded_h2o_is_met(engine: Engine, reference_file: Path) -> None:
    cases = recording(reference_file.with_name("kv_selection.json"))["h2o"]
    chosen = [case for case in cases if case["method"] == "oracle_kv_head_sum"]
    assert len(chosen) == 4
    for case in chosen:
        if FACTOR > 1 or case["heavy_ratio"] == 0.225:
            check_h2o(engine, prompts_of(reference_file)[case["prompt"]], case)
