"""Every kind of LLaMA, and every family, gives the logits of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy import KINDS, VOCABULARY, check_best
from transformers import AutoModelForCausalLM

from pyramidserve.types import Stopping
from workers.engine import stage
from workers.engine.engine import Engine, EngineRequest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_prefill_logits_are_those_of_transformers(
    kind: str,
    shards: int,
    toy: Callable[[str], Path],
    toy_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "TRACED_LOGITS", VOCABULARY)
    engine = toy_engine(kind, shards)
    model = AutoModelForCausalLM.from_pretrained(toy(kind), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator) for length in (1, 2, 17, 100, 200)]
    replies = engine.trace(
        [EngineRequest(p.tolist(), stopping=Stopping(max_tokens=1), trace=True) for p in prompts]
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            expected = model(prompt[None]).logits[0, -1]
        assert reply.traced is not None
        ours = torch.empty(VOCABULARY)
        ours[list(reply.traced.top.ids)] = torch.tensor(reply.traced.top.logits)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_tokens_are_those_of_transformers(
    kind: str, toy: Callable[[str], Path], toy_engine: Callable[..., Engine]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy(kind), dtype=torch.float32)
    prompts = [[5, 60, 7], list(range(3, 93)), [96] * 40]
    replies = toy_engine(kind).generate(
        [EngineRequest(p, stopping=Stopping(max_tokens=30, ignore_eos=True)) for p in prompts]
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        check_best(model, prompt, reply.token_ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_transformers_does(
    dtype: str,
    toy: Callable[[str], Path],
    toy_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "TRACED_LOGITS", VOCABULARY)
    prompt = list(range(3, 63))
    theirs = []
    for precision in (torch.float32, getattr(torch, dtype)):
        model = AutoModelForCausalLM.from_pretrained(toy("gqa"), dtype=precision)
        with torch.no_grad():
            theirs.append(model(torch.tensor([prompt])).logits[0, -1].float())
    request = EngineRequest(prompt, stopping=Stopping(max_tokens=1), trace=True)
    (reply,) = toy_engine("gqa", 2, dtype).trace([request])
    assert reply.traced is not None
    ours = torch.empty(VOCABULARY)
    ours[list(reply.traced.top.ids)] = torch.tensor(reply.traced.top.logits)
    assert (ours - theirs[0]).abs().mean() < 1.5 * (theirs[1] - theirs[0]).abs().mean()
