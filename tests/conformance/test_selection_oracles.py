"""H2O, Scissorhands, DefensiveKV and KVzap against ten plain lines each, fed with what a toy computes."""

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
from workers.policies.gates import read_gates

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


def seen(queries: Array, kv: Array, output: Array, window: int) -> tuple[Array, Array]:
    """The most that a row of the window pays each token, and what the token's value adds to the output."""
    tokens = len(kv)
    rows = range(max(0, tokens - window), tokens)
    paid = np.zeros((len(rows), queries.shape[1], tokens))
    for index, row in enumerate(rows):
        logits = queries[row] @ kv[: row + 1, 0].T / queries.shape[2] ** 0.5
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        paid[index, :, : row + 1] = powers / powers.sum(axis=1, keepdims=True)
    added: Array = (np.einsum("ohd,nd->nho", output, kv[:, 1]) ** 2).sum(axis=2).mean(axis=1) ** 0.5
    return paid.max(axis=(0, 1)), added


def defensive(
    queries: Array, kv: Array, output: Array, keep: int, recent: int, window: int, kernel: int
) -> tuple[list[int], float]:
    """What one KV head holds of a prompt, and how close that was; ``output`` is [hidden, heads, size]."""
    tokens, old = len(kv), len(kv) - recent
    worst, added = (each[:old] for each in seen(queries, kv, output, window))
    scores = np.maximum(worst, worst.mean()) * added
    reach = [range(max(0, place - kernel // 2), min(old, place + kernel // 2 + 1)) for place in range(old)]
    best = [max(near, key=lambda token: scores[token]) for near in reach]
    order = sorted(range(SINKS, old), key=lambda token: -scores[best[token]])
    cut = keep - recent - SINKS
    last, first = best[order[cut - 1]], best[order[cut]]
    held = [*range(SINKS), *sorted(order[:cut]), *range(old, tokens)]
    return held, 1 if last == first else (scores[last] - scores[first]) / scores[last]


def kvzap(
    kv: Array, weights: Array, seen: Array, prompt: int, keep: int, recent: int, window: int
) -> tuple[list[int], float]:
    """What one KV head holds in the end, and how close that was; ``seen`` of the prompt's tokens."""
    keys, values = kv[:, 0], kv[:, 1]
    pairs = (keys**2).reshape(len(kv), 2, -1).sum(axis=1)
    lengths = np.stack((pairs.sum(axis=1), (values**2).sum(axis=1)), axis=1)
    logs = np.log(np.concatenate((pairs, lengths), axis=1) + 1e-6)
    scores = np.exp(np.concatenate((logs, values, values**2, np.ones((len(kv), 1))), axis=1) @ weights)
    scores[:prompt] = np.maximum(scores[:prompt], seen)
    held, closest = [*range(SINKS), *range(prompt - recent, prompt)], 1.0
    choices = [(SINKS, prompt - recent, keep - recent - SINKS)]
    chunks = max(0, len(kv) - prompt - window) // 16
    for start in range(prompt, prompt + 16 * chunks, 16):
        choices.append((start, start + 16, max(1, round(16 * keep / prompt))))
    for start, end, count in choices:
        order = sorted(range(start, end), key=lambda token: -scores[token])
        held += order[:count]
        ends = scores[order[count - 1 : count + 1]]
        closest = min(closest, *(1 - ends[1:] / ends[:1]))
    return sorted([*held, *range(prompt + 16 * chunks, len(kv))]), closest


@pytest.fixture(scope="module")
def engine(toy: Callable[[str], Path], toy_gates: Callable[[str], Path]) -> Engine:
    # Kernels of plain torch take the layers one by one, so that they can be watched.
    return Engine(
        EngineConfig(
            checkpoint=str(toy("gqa")),
            dtype="float32",
            backend="reference",
            gates=str(toy_gates("gqa")),
            kv_bytes=8 << 20,
            host_bytes=8 << 20,
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


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(3, 250), min_size=SINKS + 3, max_size=90),
    st.floats(0, 1),
    st.integers(1, 50),
    st.integers(1, 20),
    st.sampled_from((0, 1, 50)),
)
def test_kvzap_holds_what_its_oracle_holds(
    engine: Engine,
    toy_gates: Callable[[str], Path],
    prompt: list[int],
    share: float,
    output: int,
    newest: int,
    window: int,
) -> None:
    keep = SINKS + 2 + int(share * (len(prompt) - 3 - SINKS))
    recent = min(newest, (keep - SINKS + 1) // 2)
    parameters = {"tokens": keep, "sliding_window_size": newest, "window_size": window}
    layers, held = watched(engine, prompt, Compression("kvzap", parameters=parameters), output)
    weights = read_gates(toy_gates("gqa")).weights.astype(np.float64)
    (stage,) = engine.stages
    for module, gates, (queries, kv), sets in zip(stage.model.layers, weights, layers, held, strict=True):
        matrix = cast(LlamaLayer, module).output_weight.double().numpy()
        group = queries.shape[1] // kv.shape[2]
        for head, own in enumerate(sets):
            mine, text = slice(head * group, (head + 1) * group), slice(len(prompt))
            paid, adds = seen(queries[text, mine], kv[text, :, head], matrix[:, mine], max(1, window))
            looked = paid * adds * bool(window)
            expected, closest = kvzap(
                kv[:, :, head], gates[head], looked, len(prompt), keep, recent, newest
            )
            assert own.tolist() == expected or closest < 1e-4
