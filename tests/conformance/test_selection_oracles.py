"""H2O and Scissorhands against ten plain lines each, fed with the queries and keys of a toy that runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fuzz import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.llama import LlamaLayer

Array = npt.NDArray[np.float64]
LAYERS = 6


def shares(query: Array, keys: Array) -> Array:
    """Attention of one row to ``keys`` [tokens, head size], the mean over ``query`` [heads, head size]."""
    logits = query @ keys.T / query.shape[1] ** 0.5
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean: Array = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
    return mean


def h2o(
    queries: Array, keys: Array, prompt: int, heavy: int, recent: int, drop: int
) -> tuple[list[int], float]:
    """What one KV head holds in the end, and how close a choice was."""
    held: list[int] = []
    paid, closest = np.zeros(len(keys)), 1.0
    for row in range(len(keys)):
        held.append(row)
        paid[held] += shares(queries[row], keys[held])
        prefilled = row == prompt - 1 and len(held) > heavy + recent
        if prefilled or (row >= prompt and len(held) == heavy + recent + drop):
            old = sorted(held[: len(held) - recent], key=lambda token: -paid[token])
            ends = paid[old[heavy - 1 : heavy + 1]] if heavy else paid[:0]
            closest = min(closest, *(ends[:1] - ends[1:]))
            held = sorted(old[:heavy]) + held[len(held) - recent :]
    return held, closest


def scissorhands(
    queries: Array, keys: Array, prompt: int, budget: int, window: int, recent: int, drop: int
) -> tuple[list[int], float]:
    """What one KV head holds in the end, and how close a share was to an even one."""
    held: list[int] = []
    low: list[
        npt.NDArray[np.bool_]
    ] = []  # of each row since the last choice, who got less than an even share
    closest = 1.0
    for row in range(len(keys)):
        held.append(row)
        own = shares(queries[row], keys[held])
        low.append(np.isin(np.arange(len(keys)), np.array(held)[own < 1 / len(held)]))
        closest = min(closest, np.abs(own * len(held) - 1).min()) if len(held) > 1 else closest
        chooses = len(held) > budget if row == prompt - 1 else row >= prompt and len(held) == budget + drop
        if chooses:
            counts = np.sum(low[-window:], axis=0)
            old = sorted(held[: len(held) - recent], key=lambda token: (counts[token], -token))
            held = sorted(old[: budget - recent]) + held[len(held) - recent :]
        if chooses or row == prompt - 1:
            low = []
    return held, closest


@pytest.fixture(scope="module")
def engine(toy: Callable[[str], Path]) -> Engine:
    # Kernels of plain torch take the layers one by one, so that they can be watched.
    return Engine(
        EngineConfig(
            str(toy("gqa")), dtype="float32", backend="reference", kv_bytes=8 << 20, host_bytes=8 << 20
        )
    )


def watched(
    engine: Engine, prompt: list[int], compression: Compression, output: int
) -> tuple[list[tuple[Array, Array]], list[npt.NDArray[np.int32]]]:
    """Runs a prompt; of each layer all queries and keys, and the positions that it held in the end."""
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    project = LlamaLayer.project

    def watch(layer: LlamaLayer, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        query, kv = project(layer, *arguments)  # type: ignore[arg-type]
        seen.setdefault(id(layer), []).append((query, kv[:, 0].clone()))
        return query, kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaLayer, "project", watch)
        stopping = Stopping(output, ignore_eos=True)
        (traced,) = engine.trace(
            [EngineRequest(prompt, stopping=stopping, compression=compression, trace=True)]
        )
    assert len(seen) == LAYERS
    both = [
        tuple(torch.cat(parts).double().numpy() for parts in zip(*layer, strict=True))
        for layer in seen.values()
    ]
    return [(query, keys) for query, keys in both], list(traced.positions)


prompts = st.lists(st.integers(3, 250), min_size=1, max_size=60)


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts, st.integers(1, 30), st.integers(0, 12), st.integers(1, 12), st.sampled_from((1, 3, 16)))
def test_h2o_holds_what_its_oracle_holds(
    engine: Engine, prompt: list[int], output: int, heavy: int, recent: int, drop: int
) -> None:
    tokens = heavy + recent
    # Half of a count is recent.
    heavy, recent = tokens - tokens // 2, tokens // 2
    compression = Compression("h2o", parameters={"tokens": tokens, "drop": drop})
    layers, held = watched(engine, prompt, compression, output)
    for (queries, keys), sets in zip(layers, held, strict=True):
        group = queries.shape[1] // keys.shape[1]
        for head, own in enumerate(sets):
            mine = queries[:, head * group : (head + 1) * group]
            expected, closest = h2o(mine, keys[:, head], len(prompt), heavy, recent, drop)
            assert len(own) == len(expected)
            assert own.tolist() == expected or closest < 1e-4


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts,
    st.integers(1, 30),
    st.integers(1, 24),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from((1, 3, 16)),
)
def test_scissorhands_holds_what_its_oracle_holds(
    engine: Engine, prompt: list[int], output: int, budget: int, window: int, recent: int, drop: int
) -> None:
    parameters = {"tokens": budget, "history_window": window, "recent_window": recent, "drop": drop}
    recent = min(recent, budget)
    layers, held = watched(engine, prompt, Compression("scissorhands", parameters=parameters), output)
    for (queries, keys), sets in zip(layers, held, strict=True):
        group = queries.shape[1] // keys.shape[1]
        for head, own in enumerate(sets):
            mine = queries[:, head * group : (head + 1) * group]
            expected, closest = scissorhands(mine, keys[:, head], len(prompt), budget, window, recent, drop)
            assert len(own) == len(expected)
            assert own.tolist() == expected or closest < 1e-4
