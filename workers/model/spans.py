"""Finds what a conversation says among its tokens. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from pyramidserve.types import ChatMessage
from workers.budget.span import Span

INSTRUCTIONS = "system"


def instruction_spans(
    messages: Sequence[ChatMessage], ids: Sequence[int], piece: Callable[[int], bytes]
) -> tuple[Span, ...]:
    """Which of a conversation's tokens give instructions: those of its system messages, in order.

    So does all that stands before the first message of another role: templates write tools there, and
    instructions of their own. Contents are looked for in the bytes that ``ids`` stand for, so that it does
    not matter who has encoded them; what a template has changed or left out is not found, and is in none.
    """
    pieces = [piece(token) for token in ids]
    text, ends = b"".join(pieces), list(accumulate(map(len, pieces)))
    found: list[Span] = []
    cursor, begun = 0, False
    for message in messages:
        said, instructs = message.content.strip().encode(), message.role == INSTRUCTIONS
        at = text.find(said, cursor) if said else -1
        if at >= 0:
            cursor = at + len(said)
            # The tokens that have any of its bytes.
            span = Span(bisect_right(ends, at), bisect_left(ends, cursor) + 1)
            if instructs:
                found.append(span)
            elif not begun:
                found = [Span(0, span.first)] if span.first else []
        begun = begun or not instructs
    return tuple(found)
