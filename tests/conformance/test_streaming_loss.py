"""Beyond the context a text is as likely to `streaming` as behind a fresh window, on the embedded model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pyramidserve.types import Compression, Sampling, Stopping
from workers.bench import texts
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.kv.page_table import Lengths

SERVED, WINDOW, BLOCK = 256, 160, 64
STREAMING = Compression("streaming", parameters={"sinks": 4, "window": WINDOW})


def asked(prompt: Sequence[int], given: Sequence[int], compression: Compression) -> EngineRequest:
    """Asks how likely ``given`` is behind ``prompt``."""
    return EngineRequest(
        list(prompt),
        Sampling(logprobs=0),
        Stopping(max_tokens=len(given), ignore_eos=True),
        compression,
        given_output_ids=tuple(given),
    )


def loss(engine: Engine, requests: list[EngineRequest], newest: int) -> float:
    """Nats a token, of the ``newest`` tokens of each."""
    replies = engine.generate(requests)
    nats = [-each.logprob for reply in replies for each in reply.logprobs[-newest:]]
    return sum(nats) / len(nats)


@pytest.fixture(scope="module")
def engine(embedded: Path) -> Engine:
    return Engine(EngineConfig(str(embedded), dtype="float32", max_model_len=SERVED, kv_bytes=64 << 20))


@pytest.fixture(scope="module")
def text(engine: Engine) -> list[int]:
    """Half as long again as the context."""
    (found,) = texts.windows(engine.tokenizer, SERVED * 3 // 2, 1)
    return found


@pytest.fixture(scope="module")
def streamed(engine: Engine, text: list[int]) -> float:
    """What is lost beyond the context."""
    return loss(engine, [asked(text[: SERVED // 2], text[SERVED // 2 :], STREAMING)], len(text) - SERVED)


def test_a_text_beyond_the_context_is_as_likely_as_behind_a_fresh_window(
    engine: Engine, text: list[int], streamed: float
) -> None:
    fresh = [
        asked(text[start - WINDOW : start], text[start : start + BLOCK], Compression())
        for start in range(SERVED, len(text), BLOCK)
    ]
    assert abs(streamed - loss(engine, fresh, BLOCK)) < 0.1


def test_sinks_that_kept_their_positions_in_a_long_text_would_cost_dearly(
    engine: Engine, text: list[int], streamed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind 20,000 tokens, of which the model knows 8,192."""
    cache = engine.stages[0].cache
    turn = cache._sinks._turn

    def behind(keys: torch.Tensor, layers: Lengths, distances: Lengths, length: int) -> torch.Tensor:
        return turn(keys, layers, distances - 20_000, length)

    monkeypatch.setattr(cache._sinks, "_turn", behind)
    asking = [asked(text[: SERVED // 2], text[SERVED // 2 :], STREAMING)]
    assert loss(engine, asking, len(text) - SERVED) > streamed + 1
