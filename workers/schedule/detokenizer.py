"""Turns output ids into text as they come, and finds stop strings in it."""

from collections.abc import Sequence
from itertools import compress

from workers.model.vocabulary import CONTEXT_IDS, Vocabulary
from workers.overlap import overlap

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one sequence's output.

    Text is held back while it ends in an unfinished character or in what may become a stop string. Stop
    strings are looked for in what special tokens say too, which is no part of the text.

    Attributes:
        stop_string: the stop string that was met, or "".
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        """``include_stop``: the text has the stop string that ends it too."""
        self._vocabulary, self._stop, self._include_stop = vocabulary, stop, include_stop
        self._ids = list(prompt_ids[-CONTEXT_IDS:])
        # Ids before _settled have given their text; decoding starts at _context, for the spaces.
        self._context = 0
        self._settled = len(self._ids)
        self._held = ""
        # Which characters of it are text.
        self._shown: list[bool] = []
        self.stop_string = ""

    def push(self, token: int, may_stop: bool = True) -> str:
        """Adds one output id; returns the text that is certain now.

        ``may_stop``: else what ends with it is no stop string, nor begins one.
        """
        self._ids.append(token)
        special = self._vocabulary.decode_special(token) if self._stop else ""
        new = self._new_text(final=bool(special))
        return self._release(new, special, final=False, stops=self._stop if may_stop else ())

    def flush(self) -> str:
        """The text that was still held back; call it when the output is complete."""
        return self._release(self._new_text(final=True), final=True, stops=self._stop)

    def _new_text(self, final: bool) -> str:
        before = self._vocabulary.decode(self._ids[self._context : self._settled])
        text = self._vocabulary.decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not final):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return text[len(before) :]

    def _release(self, new: str, special: str = "", *, final: bool, stops: Sequence[str]) -> str:
        if self.stop_string:
            return ""
        text = self._held + new + special
        shown = [*self._shown, *[True] * len(new), *[False] * len(special)]
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        if found:
            end, self.stop_string = min(found)
            end += len(self.stop_string) if self._include_stop else 0
        else:
            keep = 0 if final else max((overlap(text, stop) for stop in stops), default=0)
            end = len(text) - keep
        self._held, self._shown = text[end:], shown[end:]
        return "".join(compress(text[:end], shown))
