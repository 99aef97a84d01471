"""Draws the next tokens of sequences: what changes their logits, and what is told of them."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.types import TokenLogprob
from workers.execute.sampling import sample
from workers.model.grammar import Matching
from workers.schedule.step import NO_TOKEN, SequenceSpec


class Drawing:
    """How a sequence's tokens are drawn; where penalties look at them, with those it has.

    What is drawn is a function of the logits, the seed, the prompt and the outputs before it.
    """

    def __init__(self, spec: SequenceSpec, matching: Matching | None = None) -> None:
        """``matching``: what the outputs are held to."""
        self._matching = matching
        self.sampling = sampling = spec.sampling
        self._prompt, self._outputs = frozenset(spec.prompt_ids), list(spec.output_ids)
        self._banned, self._min_tokens = list(spec.banned), spec.min_tokens
        self._repeats = sampling.repetition_penalty != 1
        self._penalises = bool(sampling.presence_penalty or sampling.frequency_penalty)
        biases = dict(sampling.logit_bias)
        self._looks = self._repeats or self._penalises or matching is not None
        self._biased, self._biases = list(biases), torch.tensor(list(biases.values()))

    @property
    def changes(self) -> bool:
        """Whether it changes logits."""
        return bool(self._biased or self._min_tokens or self._looks)

    def change(self, logits: torch.Tensor, index: int) -> None:
        """Changes ``logits``, fp32 [vocabulary], of output ``index``.

        Presence and frequency as OpenAI's API has them; repetition as CTRL (Keskar et al., arXiv
        1909.05858, section 4.1), of prompt and output.
        """
        sampling, outputs = self.sampling, self._outputs[:index]
        if self._biased:
            logits[self._biased] += self._biases.to(logits)
        allowed = self._matching.allowed(outputs) if self._matching else None
        if index < self._min_tokens and self._banned and (allowed is None or self._has_others(allowed)):
            logits[self._banned] = -torch.inf
        if allowed is not None:
            logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
        if self._repeats and (seen := sorted(self._prompt.union(outputs))):
            old, penalty = logits[seen], sampling.repetition_penalty
            logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
        if self._penalises and outputs:
            counts = Counter(outputs)
            often = torch.tensor(list(counts.values())).to(logits)
            logits[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * often

    def _has_others(self, allowed: npt.NDArray[np.bool_]) -> bool:
        """Whether a grammar that has not come to its end allows more than what ends a reply."""
        return int(allowed.sum()) > int(allowed[self._banned].sum())

    def drew(self, index: int, token: int) -> None:
        """Notes that output ``index`` is ``token``, and that nothing is known behind it."""
        if self._looks and self._outputs[index : index + 1] != [token]:
            self._outputs[index:] = [token]


def draw(
    logits: torch.Tensor, drawings: Sequence[Drawing], indices: Sequence[int], forced: Sequence[int]
) -> tuple[list[int], tuple[TokenLogprob | None, ...]]:
    """Draws a token a row, in order of the outputs of each sequence.

    Args:
        logits: fp32 [rows, vocabulary]; they are changed.
        drawings: of the sequence of each row.
        indices: output index of each token.
        forced: tokens to take instead of drawing them; -1 draws.

    Returns:
        The tokens, NO_TOKEN where the best logit is not finite; and what is told of each, or nothing at all
        where nothing is of any.
    """
    told = [row for row, drawing in enumerate(drawings) if drawing.sampling.logprobs is not None]
    before = {row: logits[row].log_softmax(dim=-1) for row in told}
    tokens: list[int] = []
    for span in _spans(drawings):
        rows = range(span.start, span.stop)
        for row in rows:
            if drawings[row].changes:
                drawings[row].change(logits[row], indices[row])
        samplings = [drawing.sampling for drawing in drawings[span]]
        drawn = sample(logits[span], samplings, indices[span])
        for row, token in zip(rows, drawn, strict=True):
            tokens.append(token if forced[row] < 0 else forced[row])
            drawings[row].drew(indices[row], tokens[-1])
    if not told:
        return tokens, ()
    return tokens, tuple(
        _told(before[row], tokens[row], drawing.sampling.logprobs) if row in before else None
        for row, drawing in enumerate(drawings)
    )


def _spans(drawings: Sequence[Drawing]) -> Iterator[slice]:
    """Rows that can be drawn together: a sequence that looks at its outputs has one in each span."""
    begin, looking = 0, set[Drawing]()
    for row, drawing in enumerate(drawings):
        if drawing in looking:
            yield slice(begin, row)
            begin, looking = row, set()
        if drawing.changes:
            looking.add(drawing)
    yield slice(begin, len(drawings))


def _told(logprobs: torch.Tensor, token: int, count: int | None) -> TokenLogprob | None:
    if token == NO_TOKEN:
        return TokenLogprob(float("nan"))
    top = logprobs.topk(count or 0)
    return TokenLogprob(float(logprobs[token]), tuple(top.indices.tolist()), tuple(top.values.tolist()))
