"""The choices of /v1/completions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.http.choice import Choice, Told, finish
from cluster.http.pieces import Piece, shown
from pyramidserve.types import TokenLogprob, Tokens


class CompletionShape:
    """Of /v1/completions.

    ``echoed``: what goes before the text of each prompt; ``unscored``: with log-probabilities, its ids.
    """

    whole = part = "text_completion"

    def __init__(
        self, piece: Piece, echoed: Sequence[str] = (), unscored: Sequence[Sequence[int]] = ()
    ) -> None:
        self._piece, self._echoed, self._unscored = piece, echoed, unscored
        self._offsets: Counter[int] = Counter()

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The choice of a first chunk, if there is something to say."""
        echo = self._echo(choice)
        if not echo and not self._unscored:
            return None
        return self._part(choice, echo) | {"logprobs": self._logprobs(choice, self._before(choice))}

    def more(self, choice: Choice, tokens: Tokens, told: Sequence[Told]) -> dict[str, Any]:
        """The choice of a chunk that brings ``tokens``."""
        return self._part(choice, tokens.text) | {"logprobs": self._logprobs(choice, told)}

    def end(self, choice: Choice) -> dict[str, Any]:
        """The choice of its last chunk."""
        return self._part(choice, "") | finish(choice)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice that is there as a whole."""
        told = self._logprobs(choice, [*self._before(choice), *choice.told])
        part = self._part(choice, self._echo(choice) + choice.text)
        return part | {"logprobs": told} | finish(choice)

    def _part(self, choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def _echo(self, choice: Choice) -> str:
        return self._echoed[choice.prompt] if self._echoed else ""

    def _before(self, choice: Choice) -> list[tuple[int, TokenLogprob | None]]:
        """What has no probability, as nothing is before it or it is not asked for."""
        return [(token, None) for token in self._unscored[choice.prompt]] if self._unscored else []

    def _logprobs(
        self, choice: Choice, told: Sequence[tuple[int, TokenLogprob | None]]
    ) -> dict[str, Any] | None:
        if not told:
            return None
        tokens = [shown(self._piece(token)) for token, _ in told]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each and each.logprob for _, each in told],
            "top_logprobs": [each and self._top(token, each) for token, each in told],
            "text_offset": offsets,
        }

    def _top(self, token: int, told: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        own = ((token, told.logprob),)
        for other, logprob in (*zip(told.top_ids, told.top_logprobs, strict=True), *own):
            top.setdefault(shown(self._piece(other)), logprob)  # of those that look alike, the likelier
        return top
