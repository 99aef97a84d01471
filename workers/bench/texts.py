"""Real text that every Python brings along."""

from pydoc_data.topics import topics

from workers.model.tokenizer import Tokenizer


def windows(tokenizer: Tokenizer, tokens: int, count: int) -> list[list[int]]:
    """``count`` pieces of ``tokens`` tokens of Python's reference, none overlapping, long chapters first.

    There may be fewer, as the reference ends.
    """
    chapters = sorted(topics.values(), key=len, reverse=True)
    pieces: list[list[int]] = []
    short: list[int] = []
    for chapter in chapters:
        if len(pieces) == count:
            break
        # What is left of a chapter is joined to the next.
        short += tokenizer.encode(chapter)
        while len(short) >= tokens and len(pieces) < count:
            pieces.append(short[:tokens])
            short = short[tokens:]
    return pieces
