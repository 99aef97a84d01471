"""Tokens as text, in what is told of them."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.http.choice import Told

# What an id stands for.
Piece = Callable[[int], bytes]


def shown(piece: bytes) -> str:
    """The text of a token; of one that is part of a character, its bytes, so that no two look alike."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{each:02x}" for each in piece)


def likely(piece: Piece, told: Sequence[Told]) -> list[dict[str, Any]]:
    """How likely output was, and what else would have been, as chats and responses have it."""
    return [
        _named(piece(token), of.logprob)
        | {
            "top_logprobs": [
                _named(piece(other), logprob)
                for other, logprob in zip(of.top_ids, of.top_logprobs, strict=True)
            ]
        }
        for token, of in told
    ]


def _named(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": shown(piece), "logprob": logprob, "bytes": list(piece)}
