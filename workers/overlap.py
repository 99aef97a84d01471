"""Text that comes in pieces, of which the end may belong to something that is looked for."""


def overlap(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that ``mark`` may go on from."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
