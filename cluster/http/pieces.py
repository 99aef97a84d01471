"""Tokens as text, in what is told of them."""

from collections.abc import Callable

# What an id stands for.
Piece = Callable[[int], bytes]


def shown(piece: bytes) -> str:
    """The text of a token; of one that is part of a character, its bytes, so that no two look alike."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{each:02x}" for each in piece)
