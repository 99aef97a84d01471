"""Control tokens that somebody has typed: text, and nothing else."""

import re
from collections.abc import Iterable


class ControlTokens:
    """Control tokens by their text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        from transformers.utils.chat_template_utils import mark_control_tokens

        longest_first = sorted(tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # A content that ends with the beginning of one may become one where a template puts more behind it.
        self._begun = {token[:end] for token in longest_first for end in range(1, len(token))}
        self._most = max(map(len, self._begun), default=0)
        # A mark by itself parts what is on both sides.
        self._mark = mark_control_tokens("x", re.compile("x"))[0]

    def mark(self, content: str) -> str:
        """``content`` with marks that keep what looks like one, whole or begun, from being one.

        The marks are those of ``transformers``, whose ``encode_marked_chat`` reads them.
        """
        from transformers.utils.chat_template_utils import mark_control_tokens

        marked: str = mark_control_tokens(content, self._any)
        said = marked.rstrip()
        if any(said[-size:] in self._begun for size in range(1, min(self._most, len(said)) + 1)):
            marked = said + self._mark + marked[len(said) :]
        return marked
