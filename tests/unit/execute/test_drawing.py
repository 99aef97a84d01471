"""What changes logits before a token is drawn, and what is told of it."""

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

from pyramidserve.types import Compression, Sampling
from workers.execute.drawing import Drawing, draw
from workers.schedule.step import NO_TOKEN, SequenceSpec

VOCABULARY = 50


def drawing(
    sampling: Sampling,
    prompt_ids: tuple[int, ...] = (),
    output_ids: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
    min_tokens: int = 0,
) -> Drawing:
    spec = SequenceSpec(
        sequence=1,
        prompt_tokens=max(1, len(prompt_ids)),
        compression=Compression(),
        sampling=sampling,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        banned=banned,
        min_tokens=min_tokens,
    )
    return Drawing(spec)


def some_logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3


def two_likely() -> tuple[torch.Tensor, int, int]:
    """Logits of which all but two are far below, and which these are: one is a little likelier."""
    logits, best, second = torch.full((VOCABULARY,), -9.0), 17, 4
    logits[best], logits[second] = 3.0, 2.0
    return logits, best, second


def test_repetition_is_as_transformers_has_it() -> None:
    logits, seen = some_logits(), (3, 7, 7, 20)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())
    ours = logits[0].clone()
    drawing(Sampling(repetition_penalty=1.7), seen[:2], seen[2:]).change(ours, 2)
    assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_min_p_is_as_transformers_has_it(temperature: float) -> None:
    logits = some_logits()
    # Which ids there are does not matter to it.
    kept = MinPLogitsWarper(0.1)(torch.LongTensor(1, 0), logits / temperature)[0].isfinite()
    sampling = [Sampling(temperature, seed=seed, min_p=0.1) for seed in range(400)]
    rows = logits.expand(400, -1).clone()
    tokens, _ = draw(rows, [drawing(each) for each in sampling], [0] * 400, [-1] * 400)
    assert set(tokens) == set(kept.nonzero().flatten().tolist())


def test_presence_and_frequency_are_taken_from_what_the_output_has() -> None:
    before = some_logits()[0]
    after = before.clone()
    penalised = drawing(Sampling(presence_penalty=0.5, frequency_penalty=0.25), (1, 2), (4, 9, 4, 8))
    penalised.change(after, 3)  # of output 3: the fourth is not there yet
    expected = before.clone()
    expected[4] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.allclose(after, expected)


def test_ends_are_not_drawn_before_there_are_enough() -> None:
    end = int(some_logits().argmax())
    own = drawing(Sampling(), banned=(end,), min_tokens=2)
    drawn = [draw(some_logits(), [own], [index], [-1])[0][0] for index in range(4)]
    assert [token == end for token in drawn] == [False, False, True, True]


def test_a_bias_is_added() -> None:
    own = drawing(Sampling(logit_bias={5: 100.0, 6: 50.0}))
    assert draw(some_logits(), [own], [0], [-1])[0] == [5]


def test_what_is_drawn_counts_for_the_next_row() -> None:
    """As in a verification: a row's outputs are those that the rows before it have drawn."""
    own = drawing(Sampling(presence_penalty=2.0), output_ids=(30, 31, 32, 33))
    logits, best, second = two_likely()
    rows = logits.expand(3, -1).clone()
    tokens, _ = draw(rows, [own] * 3, [1, 2, 3], [-1] * 3)
    assert tokens == [best, second, best]


def test_forced_tokens_count_too() -> None:
    own = drawing(Sampling(presence_penalty=2.0))
    logits, best, second = two_likely()
    tokens, _ = draw(logits.expand(2, -1).clone(), [own] * 2, [0, 1], [best, -1])
    assert tokens == [best, second]


def test_log_probabilities_are_those_before_anything_changes_them() -> None:
    logits = some_logits(2)
    expected = logits.log_softmax(dim=-1)
    told = drawing(Sampling(logit_bias={5: 100.0}, logprobs=3))
    tokens, logprobs = draw(logits.clone(), [told, drawing(Sampling())], [0, 0], [-1, -1])
    first, second = logprobs
    assert tokens[0] == 5
    assert second is None
    assert first is not None
    assert first.logprob == float(expected[0, 5])
    top = expected[0].topk(3)
    assert (first.top_ids, first.top_logprobs) == (tuple(top.indices.tolist()), tuple(top.values.tolist()))
    assert draw(logits.clone(), [drawing(Sampling())], [0], [-1])[1] == ()


def test_logits_that_are_not_finite_are_told() -> None:
    logits = torch.full((1, VOCABULARY), math.nan)
    tokens, (told,) = draw(logits, [drawing(Sampling(logprobs=1, presence_penalty=1.0))], [0], [-1])
    assert tokens == [NO_TOKEN]
    assert told is not None
    assert math.isnan(told.logprob)
