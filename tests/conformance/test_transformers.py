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
def _expected(checkpoint: Path) -> list[tuple[list[int], int]]:
    """Per prompt, transformers' greedy tokens, and how many come before a near tie."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = []
    for prompt in _prompts(checkpoint):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [step[0].topk(2).values for step in out.logits]
        ties = [i for i, (first, second) in enumerate(best) if first - second < MARGIN]
        tokens = out.sequences[0, len(prompt) :].tolist()
        expected.append((tokens, min(ties, default=TOKENS)))
    return expected


@pytest.mark.parametrize("boundaries", [(), (14,), (9, 20)], ids=["1-shard", "2-shards", "3-shards"])
def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_mixed_batch(
    embedded: Path, boundaries: tuple[int, ...]
) -> None:
    engine = Engine(
        EngineConfig(checkpoint=str(embedded), dtype="float32", boundaries=boundaries, kv_bytes=1 << 30)
    )
    stopping = Stopping(max_tokens=TOKENS, ignore_eos=True)
    requests = [EngineRequest(prompt, stopping=stopping) for prompt in _prompts(embedded)]
    others = [
        EngineRequest(prompt, stopping=stopping, compression=Compression("pyramid", prefill, 0.6))
        for prompt, prefill in zip(_prompts(embedded)[-6:], ("prune", "evict") * 3, strict=True)
    ]
    mixed = engine.generate([*requests, *others])[:PROMPTS]
    # Alone takes one step a token; the split is covered by the mixed batch.
    alone = [engine.generate([request])[0] for request in requests] if not boundaries else mixed
    expected = _expected(embedded)
    assert sum(certain < TOKENS for _, certain in expected) <= MOST_CUT_SHORT
    for (tokens, certain), together, single in zip(expected, mixed, alone, strict=True):
        assert list(together.token_ids[:certain]) == tokens[:certain]
        assert list(single.token_ids[:certain]) == tokens[:certain]
    engine.check_integrity()
