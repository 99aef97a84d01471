"""Turns output ids into text as they come, and finds stop strings in it."""

from collections.abc import Callable, Sequence

# Text of output ids.
Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one sequence's output.

    Text is held back while it ends in an unfinished character or in what may become a stop string.

    Attributes:
        stop_string: the stop string that was met, or "".
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # Ids before _settled have given their text; decoding starts at _context, for the spaces.
        self._context = 0
        self._settled = 0
        self._held = ""
        self.stop_string = ""

    def push(self, token: int) -> str:
        """Adds one output id; returns the text that is certain now."""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def flush(self) -> str:
        """The text that was still held back; call it when the output is complete."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._settled])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not final):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return text[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stop_string:
            return ""
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            at, self.stop_string = min(found)
            self._held = ""
            return text[:at]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` may go on from."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
