"""What a request asks of drawing holds however its reply comes about; its log-probabilities are right."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pyramidserve.types import Compression, FinishReason, Sampling, Stopping
from workers.engine.engine import Engine, EngineRequest
from workers.schedule.step import Step

POLICIES = {
    "full": Compression(),
    "prune": Compression("pyramid", "prune", kv_keep=0.6),
    "evict": Compression("pyramid", "evict", kv_keep=0.6),
    "exact": Compression("pyramid", "evict", kv_keep=0.6, recall="exact"),
    "step": Compression("pyramid", "evict", kv_keep=0.6, recall="step"),
    "h2o": Compression("h2o", parameters={"tokens": 40, "drop": 4}),
}
SAMPLINGS = {
    "penalties": Sampling(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3),
    "drawn": Sampling(1.2, seed=5, min_p=0.02, frequency_penalty=1.0, logit_bias={65: 3.0}, top_p=0.95),
}
PROMPT = [random.Random(1).randrange(3, 259) for _ in range(70)]
TOKENS = 48
WHOLE = Stopping(TOKENS, ignore_eos=True)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_reply_goes_on_as_it_would_have(
    policy: str, sampling: str, toy_engine: Callable[..., Engine]
) -> None:
    engine = toy_engine(shards=2)
    request = EngineRequest(PROMPT, SAMPLINGS[sampling], WHOLE, POLICIES[policy])
    (whole,) = engine.generate([request])
    plain = replace(request, sampling=replace(Sampling(), seed=5))
    (without,) = engine.generate([plain])
    assert whole.token_ids != without.token_ids
    for known in (1, 17, 40):
        resumed = replace(
            request, resume_output_ids=whole.token_ids[:known], sampling=replace(request.sampling, seed=5)
        )
        (rest,) = engine.generate([resumed])
        assert rest.token_ids == whole.token_ids[known:]
    engine.check_integrity()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_exact_is_what_the_full_cache_says(sampling: str, toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine(shards=2)
    full, exact = engine.generate(
        [
            EngineRequest(PROMPT, SAMPLINGS[sampling], WHOLE, POLICIES["full"]),
            EngineRequest(PROMPT, SAMPLINGS[sampling], WHOLE, POLICIES["exact"]),
        ]
    )
    assert full.token_ids == exact.token_ids


def log_probabilities(engine: Engine, request: EngineRequest) -> torch.Tensor:
    """What the last shard computes of each output of ``request``, which is given, fp32 [outputs, ids]."""
    rows: list[torch.Tensor] = []
    stage = engine.stages[-1]
    sample = stage._sample

    def recorded(step: Step, hidden: torch.Tensor) -> tuple[Step, torch.Tensor]:
        rows.append(stage.model.logits(hidden[-1:] if step.new else hidden))
        return sample(step, hidden)

    stage._sample = recorded  # type: ignore[method-assign]
    engine.generate([request])
    del stage._sample
    return torch.cat(rows)[: len(request.given_output_ids)].log_softmax(dim=-1)


@pytest.mark.parametrize("policy", POLICIES)
def test_given_text_is_scored_as_it_is_read(policy: str, toy_engine: Callable[..., Engine]) -> None:
    """Also behind a compressed prompt; other requests beside it change nothing."""
    engine = toy_engine(shards=2)
    given = tuple(random.Random(2).randrange(3, 259) for _ in range(TOKENS))
    request = EngineRequest(
        PROMPT, Sampling(logprobs=2), Stopping(TOKENS), POLICIES[policy], given_output_ids=given
    )
    beside = [EngineRequest(PROMPT[:40], stopping=WHOLE, compression=each) for each in POLICIES.values()]
    reply, *_ = engine.generate([request, *beside])
    assert reply.token_ids == given
    assert reply.receipt.finish_reason is FinishReason.LENGTH
    own = [each.logprob for each in reply.logprobs]
    read = log_probabilities(engine, replace(request, sampling=Sampling(), stopping=WHOLE))
    torch.testing.assert_close(torch.tensor(own), read[torch.arange(TOKENS), torch.tensor(given)])
    assert [each.top_ids[0] for each in reply.logprobs] == read.argmax(dim=-1).tolist()
    # What was read so far need not be told again.
    (rest,) = engine.generate([replace(request, resume_output_ids=given[:20])])
    assert rest.token_ids == given[20:]
    torch.testing.assert_close(
        torch.tensor([each.logprob for each in rest.logprobs]), torch.tensor(own[20:])
    )


def test_a_drawn_reply_tells_its_log_probabilities(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine(shards=2)
    for policy, compression in POLICIES.items():
        request = EngineRequest(PROMPT, Sampling(1.0, seed=3, logprobs=0), WHOLE, compression)
        reply, plain = engine.generate([request, replace(request, sampling=Sampling(1.0, seed=3))])
        assert reply.token_ids == plain.token_ids, policy
        assert plain.logprobs == ()
        given = replace(request, given_output_ids=reply.token_ids)
        (scored,) = engine.generate([given])
        assert scored.token_ids == reply.token_ids
        ours = torch.tensor([each.logprob for each in reply.logprobs])
        torch.testing.assert_close(ours, torch.tensor([each.logprob for each in scored.logprobs]))


def test_nothing_ends_a_reply_before_it_may(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine(shards=2)
    (free,) = engine.generate([EngineRequest(PROMPT, stopping=WHOLE)])
    end = free.token_ids[3]
    early = Stopping(TOKENS, ignore_eos=True, stop_token_ids=(end,))
    (stopped,) = engine.generate([EngineRequest(PROMPT, stopping=early)])
    assert stopped.receipt.output_tokens <= 4
    (later,) = engine.generate([EngineRequest(PROMPT, stopping=replace(early, min_tokens=20))])
    assert end not in later.token_ids[:20]
    assert later.receipt.output_tokens >= 20


def test_the_text_may_have_the_stop_string(toy_engine: Callable[..., Engine]) -> None:
    engine = toy_engine(shards=2)
    (free,) = engine.generate([EngineRequest(PROMPT, stopping=WHOLE)])
    stop = free.text[10:12]
    for include in (False, True):
        asked = replace(WHOLE, stop=stop, include_stop=include)
        (reply,) = engine.generate([EngineRequest(PROMPT, stopping=asked)])
        assert reply.receipt.stop_string == stop
        assert reply.text == free.text[: free.text.index(stop)] + (stop if include else "")
