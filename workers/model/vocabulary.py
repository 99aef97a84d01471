"""What ids say: a tokenizer as those need it who have ids and want text."""

from collections.abc import Sequence
from typing import Protocol

# Ids in front that decoding looks at: the first space of a text, and an unfinished character, hang on them.
CONTEXT_IDS = 8


class Vocabulary(Protocol):
    """The text of ids; see ``workers.model.tokenizer``."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        ...

    def decode_special(self, token: int) -> str:
        """The text of a special token; nothing of another."""
        ...


def text_behind(vocabulary: Vocabulary, before: Sequence[int], ids: Sequence[int]) -> str:
    """What ``ids`` say behind ``before``."""
    context = list(before[-CONTEXT_IDS:])
    return vocabulary.decode([*context, *ids])[len(vocabulary.decode(context)) :]
