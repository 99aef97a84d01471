"""Shares of tokens and shares of bytes: how much of a prompt's KV stays, either way. Pure."""

import math
from dataclasses import dataclass

from workers.budget.kv_format import KV_FORMATS, RECENT_ROOM, KVFormat
from workers.budget.plan import INDEX_SHARE

# Of ``kv_keep``, where an index takes part of it: more than that.
LEAST_INDEXED = 2 * INDEX_SHARE


@dataclass(frozen=True)
class KVShare:
    """What a prompt's KV takes of the bytes that all of it takes in 16 bits.

    What pages are rounded up by is in none of it, nor are the few rows that scale an index.

    Attributes:
        token: of its own bytes in 16 bits, what a token takes, its scales included.
        index: what the index takes of one whose key alone is in it.
        fixed_tokens: how many tokens in 16 bits have the bytes that a layer takes whatever it holds.
    """

    token: float
    index: float = INDEX_SHARE
    fixed_tokens: float = 0.0

    @classmethod
    def of(cls, form: KVFormat, head_size: int) -> "KVShare":
        """In a format, of heads of ``head_size``."""
        recent = RECENT_ROOM * KV_FORMATS[form.recent].share(head_size) if form.recent else 0.0
        token = form.share(head_size)
        return cls(token, token / form.keys_per_row, recent)

    def in_bytes(self, tokens: float, prompt_tokens: int, indexes: bool = False) -> float:
        """The share of bytes, where the share ``tokens`` of a prompt stays; may be above 1."""
        beside = indexes * self.index * (1 - tokens)
        return tokens * self.token + beside + self.fixed_tokens / prompt_tokens

    def in_tokens(self, share: float, prompt_tokens: int, indexes: bool = False) -> float:
        """The share of a prompt's tokens that there is room for in a ``share`` of bytes.

        It is 1 or more where all stay, and below 0 where there is no room for what is taken in any case.
        """
        taken = self.fixed_tokens / prompt_tokens + indexes * self.index
        return (share - taken) / (self.token - indexes * self.index)

    def kv_keep(self, share: float, prompt_tokens: int, indexes: bool = False) -> float:
        """The ``kv_keep`` of a ``share`` of bytes, of which an index is part where there is one.

        It is 1 where all tokens stay. Where there is no room for a token a layer, or for an index and as
        much again, it is the least that can be asked for.
        """
        tokens = self.in_tokens(share, prompt_tokens, indexes)
        if not indexes:
            return min(1.0, max(1 / prompt_tokens, tokens))
        return min(1.0, max(math.nextafter(LEAST_INDEXED, 1), tokens + INDEX_SHARE * (1 - tokens)))
