"""How tokens are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyramidserve.integers import whole_number


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: keeps this many of the most likely tokens; None keeps all.
        seed: makes sampling repeatable, as the draw is a function of (seed, output index);
            None lets the server pick one.
        min_p: keeps tokens that are at least this times as likely as the likeliest, in [0, 1].
        presence_penalty: taken from the logit of what the output has, in [-2, 2].
        frequency_penalty: taken from it as often as the output has it, in [-2, 2].
        repetition_penalty: divides the logit of what prompt and output have, or multiplies one below 0.
        logit_bias: added to the logits of these ids, each in [-100, 100].
        logprobs: tells the log-probability of each output token, before anything of this changes it, and of
            so many of the likeliest in its place, at most 20; None: of none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Makes ``logit_bias`` pairs in order of their ids, so that equals are equal and have a hash.

        Raises InvalidRequestError where an id is no whole number.
        """
        biases = dict(self.logit_bias).items()
        pairs = sorted((whole_number("each id of logit_bias", token), bias) for token, bias in biases)
        object.__setattr__(self, "logit_bias", tuple(pairs))
