"""H2O, Scissorhands and DefensiveKV against ten plain lines each, fed with what a toy computes."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

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
from workers.policies.defensive import RECENT, SINKS

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


def defensive(
    queries: Array, kv: Array, output: Array, keep: int, recent: int, window: int, kernel: int
) -> tuple[list[int], float]:
    """What one KV head holds of a prompt, and how close that was; ``output`` is [hidden, heads, size]."""
    tokens = len(kv)
    rows = range(max(0, tokens - window), tokens)
    paid = np.zeros((len(rows), queries.shape[1], tokens))
    for index, row in enumerate(rows):
        logits = queries[row] @ kv[: row + 1, 0].T / queries.shape[2] ** 0.5
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        paid[index, :, : row + 1] = powers / powers.sum(axis=1, keepdims=True)
    old = tokens - recent
    worst = paid.max(axis=(0, 1))[:old]
    added = (np.einsum("ohd,nd->nho", output, kv[:old, 1]) ** 2).sum(axis=2).mean(axis=1) ** 0.5
    scores = np.maximum(worst, worst.mean()) * added
    reach = [range(max(0, place - kernel // 2), min(old, place + kernel // 2 + 1)) for place in range(old)]
    best = [max(near, key=lambda token: scores[token]) for near in reach]
    order = sorted(range(SINKS, old), key=lambda token: -scores[best[token]])
    cut = keep - recent - SINKS
    last, first = best[order[cut - 1]], best[order[cut]]
    held = [*range(SINKS), *sorted(order[:cut]), *range(old, tokens)]
    return held, 1 if last == first else (scores[last] - scores[first]) / scores[last]


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
    """Runs a prompt; of each layer all queries and KV, and the positions that it held in the end."""
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    project = LlamaLayer.project

    def watch(layer: LlamaLayer, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        query, kv = project(layer, *arguments)  # type: ignore[arg-type]
        seen.setdefault(id(layer), []).append((query, kv.clone()))
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
    return [(query, kv) for query, kv in both], list(traced.positions)


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
    for (queries, kv), sets in zip(layers, held, strict=True):
        group = queries.shape[1] // kv.shape[2]
        for head, own in enumerate(sets):
            mine = queries[:, head * group : (head + 1) * group]
            expected, closest = h2o(mine, kv[:, 0, head], len(prompt), heavy, recent, drop)
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
    for (queries, kv), sets in zip(layers, held, strict=True):
        group = queries.shape[1] // kv.shape[2]
        for head, own in enumerate(sets):
            mine = queries[:, head * group : (head + 1) * group]
            keys = kv[:, 0, head]
            expected, closest = scissorhands(mine, keys, len(prompt), budget, window, recent, drop)
            assert len(own) == len(expected)
            assert own.tolist() == expected or closest < 1e-4


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(3, 250), min_size=SINKS + 3, max_size=120),
    st.floats(0, 1),
    st.integers(1, 130),
    st.sampled_from((1, 5, 7)),
)
def test_defensive_holds_what_its_oracle_holds(
    engine: Engine, prompt: list[int], share: float, window: int, kernel: int
) -> None:
    least = SINKS + 2
    keep = least + int(share * (len(prompt) - 1 - least))
    recent = min(RECENT, (keep - SINKS + 1) // 2)
    parameters = {"tokens": keep, "window_size": window, "kernel_size": kernel}
    layers, held = watched(engine, prompt, Compression("defensive", parameters=parameters), 1)
    (stage,) = engine.stages
    for module, (queries, kv), sets in zip(stage.model.layers, layers, held, strict=True):
        output = cast(LlamaLayer, module).output_weight.double().numpy()
        group = queries.shape[1] // kv.shape[2]
        for head, own in enumerate(sets):
            mine = slice(head * group, (head + 1) * group)
            expected, closest = defensive(
                queries[:, mine], kv[:, :, head], output[:, mine], keep, recent, window, kernel
            )
            assert own.tolist() == expected or closest < 1e-4
