"""What a model loses where one of its layers alone keeps less."""

import math
from collections.abc import Callable, Sequence
from statistics import mean

from pyramidserve.types import Compression, Sampling, Stopping, TokenLogprob
from workers.engine.engine import Engine, EngineRequest

# Of the likeliest tokens in each place, by which two readings are compared; as many as can be asked for.
LIKELIEST = 20


class LayerLosses:
    """Has an engine read on behind the same prompts, each time with one layer cut.

    What is lost is how far the next token's distribution moves, which few texts tell: the divergence from
    the full cache's (Kullback and Leibler), of the likeliest tokens and all others together.
    """

    def __init__(self, engine: Engine, texts: Sequence[Sequence[int]], prompt: int, policy: str) -> None:
        """``engine`` has room for all ``texts`` at once, whose first ``prompt`` tokens are prompts."""
        self._engine, self._texts, self._prompt, self._policy = engine, texts, prompt, policy
        self._whole = self._read(Compression())

    def measure(self, shares: Sequence[float], say: Callable[[str], None]) -> list[dict[float, float]]:
        """Of each layer what is lost, in nats a token, by the share of the prompt that it keeps."""
        layers = self._engine.model.layers
        losses: list[dict[float, float]] = []
        for layer in range(layers):
            losses.append({1.0: 0.0})
            for share in shares:
                counts = [self._prompt] * layers
                counts[layer] = max(1, int(share * self._prompt))
                losses[-1][share] = self.of(
                    Compression(self._policy, "", parameters={"tokens": tuple(counts)})
                )
            told = ", ".join(f"{losses[-1][share]:.4f} at {share:g}" for share in shares)
            say(f"layer {layer} of {layers} loses {told}")
        return losses

    def of(self, compression: Compression) -> float:
        """What is lost with it, in nats a token."""
        return mean(map(divergence, self._whole, self._read(compression)))

    def of_all(self) -> float:
        """What is lost without the prompts, of which but the last token is read; in nats a token."""
        return mean(map(divergence, self._whole, self._read(Compression(), self._prompt - 1)))

    def _read(self, compression: Compression, first: int = 0) -> list[TokenLogprob]:
        """How likely each token behind each prompt is, and the likeliest in its place.

        The prompts begin with their tokens ``first``.
        """
        requests = [
            EngineRequest(
                text[first : self._prompt],
                sampling=Sampling(logprobs=LIKELIEST),
                stopping=Stopping(max_tokens=len(text) - self._prompt),
                compression=compression,
                given_output_ids=tuple(text[self._prompt :]),
            )
            for text in self._texts
        ]
        return [each for reply in self._engine.generate(requests) for each in reply.logprobs]


def divergence(whole: TokenLogprob, cut: TokenLogprob) -> float:
    """From ``whole`` to ``cut``, in nats, of what both name and of all else together."""
    named = dict(zip(cut.top_ids, cut.top_logprobs, strict=True))
    both = [
        (logprob, named[token])
        for token, logprob in zip(whole.top_ids, whole.top_logprobs, strict=True)
        if token in named
    ]
    rest = max(1e-9, 1 - sum(math.exp(a) for a, _ in both))
    other = max(1e-9, 1 - sum(math.exp(b) for _, b in both))
    return sum(math.exp(a) * (a - b) for a, b in both) + rest * math.log(rest / other)
