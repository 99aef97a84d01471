"""Grammars that output is held to: JSON schemas, regular expressions, and Lark's, by llguidance."""

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Constraint
from workers.model.tokenizer import Tokenizer
from workers.tools.forced import JSON_FORM

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHARACTERS = 64 << 10


class Grammars:
    """Of one model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Collection[int]) -> None:
        """``vocabulary``: ids that logits have; ``ends``: those that end a reply."""
        self.vocabulary, self.ends = vocabulary, sorted(ends)
        self._tokenizer = tokenizer

    def check(self, constraint: Constraint, output_ids: Sequence[int] = ()) -> None:
        """Raises InvalidRequestError where there is no such grammar, or ``output_ids`` do not fit it."""
        from llguidance import LLMatcher

        kind, text = constraint.kind, constraint.text
        if len(text) > MOST_CHARACTERS:
            raise InvalidRequestError(
                f"constraint has {len(text)} characters; at most {MOST_CHARACTERS} are allowed"
            )
        problem = LLMatcher.validate_grammar(_grammar(constraint), self._known)
        if problem:
            raise InvalidRequestError(
                f"constraint is a {kind} that cannot be: {' '.join(problem.split())[:300]}"
            )
        if output_ids and (fits := Matching(self, constraint).fits(output_ids)) < len(output_ids):
            raise InvalidRequestError(
                f"resume_output_ids do not fit the constraint from number {fits} on; send what its stream "
                "brought"
            )

    def matcher(self, constraint: Constraint) -> "LLMatcher":
        """At the beginning of an output."""
        from llguidance import LLMatcher

        return LLMatcher(self._known, _grammar(constraint))

    @cached_property
    def _known(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        serialised = self._tokenizer.serialised
        if serialised is None:
            raise InvalidRequestError(
                "constraint needs a tokenizer of the tokenizers library, which this model has not; leave "
                "it out"
            )
        return LLTokenizer(serialised, n_vocab=self.vocabulary, eos_token=self.ends)


class Matching:
    """How far an output is in its grammar; a function of the output alone."""

    def __init__(self, grammars: Grammars, constraint: Constraint) -> None:
        self._matcher, self._grammars = grammars.matcher(constraint), grammars
        self._taken: list[int] = []

    def allowed(self, output_ids: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Which ids may follow ``output_ids``, bool [vocabulary]; None: all, as they have ended."""
        matcher, taken = self._matcher, self._taken
        pairs = enumerate(zip(taken, output_ids, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), min(len(taken), len(output_ids)))
        if same < len(taken):
            matcher.rollback(len(taken) - same)
            del taken[same:]
        for token in output_ids[same:]:
            if matcher.is_stopped() or not matcher.consume_token(token):
                return None
            taken.append(token)
        ends, vocabulary = self._grammars.ends, self._grammars.vocabulary
        if matcher.is_stopped():
            if taken and taken[-1] in ends:
                return None
            return np.isin(np.arange(vocabulary), ends)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)

    def fits(self, output_ids: Sequence[int]) -> int:
        """How many of ``output_ids``, from the first on, the grammar allows; behind an end, all."""
        count = self._matcher.validate_tokens(list(output_ids))
        behind = output_ids[count : count + 1]
        return len(output_ids) if behind and behind[0] in self._grammars.ends else count


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    try:
        match constraint.kind:
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(constraint.text, defaults=JSON_FORM)
            case "regex":
                return LLMatcher.grammar_from_regex(constraint.text)
            case "grammar":
                return LLMatcher.grammar_from_lark(constraint.text)
    except ValueError as error:
        raise InvalidRequestError(f"constraint is a {constraint.kind} that cannot be: {error}") from error
    raise InvalidRequestError(
        f"constraint kind is {constraint.kind!r:.40}; it must be one of json_schema, regex, grammar"
    )
