"""`full` says what transformers says on the embedded model, token by token."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyramidserve.types import Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.tokenizer import Tokenizer

PROMPTS, TOKENS = 20, 64
# Of them, those that are run alone, and those that are run where the model is split.
ALONE, SPLIT = slice(0, None, 3), slice(0, None, 4)
# A stream is compared up to the first step whose two best logits are closer than this.
MARGIN = 1e-3
MOST_CUT_SHORT = PROMPTS * 0.05


@cache
def _prompts(checkpoint: Path) -> list[list[int]]:
    """Twenty pieces of English and code of 8 to 400 tokens."""
    tokenizer = Tokenizer(checkpoint)
    texts = sorted(topics.values(), key=len, reverse=True)[:PROMPTS]
    return [tokenizer.encode(text)[20 * i : 20 * i + 8 + 20 * i] for i, text in enumerate(texts, start=0)]


@cache
def _model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@cache
def _certain(checkpoint: Path, prompt: tuple[int, ...], output: tuple[int, ...]) -> int:
    """How many of ``output`` come before a near tie; those must be what transformers would say.

    One forward over all tokens decides it: greedy decoding says the same if each token is the best
    behind those before it. Splits that say the same are decided once.
    """
    with torch.no_grad():
        logits = _model(checkpoint)(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    ties = (best.values[:, 0] - best.values[:, 1] < MARGIN).nonzero().flatten().tolist()
    certain: int = min(ties, default=len(output))
    assert list(output[:certain]) == best.indices[:certain, 0].tolist()
    return certain


@pytest.mark.parametrize("boundaries", [(), (14,), (9, 20)], ids=["1-shard", "2-shards", "3-shards"])
def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_mixed_batch(
    embedded: Path, boundaries: tuple[int, ...]
) -> None:
    engine = Engine(
        EngineConfig(checkpoint=str(embedded), dtype="float32", boundaries=boundaries, kv_bytes=1 << 30)
    )
    stopping = Stopping(max_tokens=TOKENS, ignore_eos=True)
    prompts = _prompts(embedded)[SPLIT if boundaries else slice(None)]
    requests = [EngineRequest(prompt, stopping=stopping) for prompt in prompts]
    others = [
        EngineRequest(prompt, stopping=stopping, compression=Compression("pyramid", prefill, 0.6))
        for prompt, prefill in zip(_prompts(embedded)[-6:], ("prune", "evict") * 3, strict=True)
    ]
    mixed = engine.generate([*requests, *others])[: len(prompts)]
    certain = []
    for prompt, together in zip(prompts, mixed, strict=True):
        certain.append(_certain(embedded, tuple(prompt), together.token_ids))
        assert len(together.token_ids) == TOKENS
    assert sum(tokens < TOKENS for tokens in certain) <= MOST_CUT_SHORT
    if not boundaries:  # as it takes one step a token; the split is covered by the mixed batch
        for request, together, tokens in list(zip(requests, mixed, certain, strict=True))[ALONE]:
            (single,) = engine.generate([request])
            assert single.token_ids[:tokens] == together.token_ids[:tokens]
    engine.check_integrity()
