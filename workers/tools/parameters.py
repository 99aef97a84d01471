"""Parameters that a model writes one by one, as the JSON object that they are."""

import json
import re
from collections.abc import Callable, Collection, Mapping

from workers.overlap import overlap

OPENS = "<parameter="
NAMED = re.compile(rf"{OPENS}([^>\n]*)>")
CLOSES = "</parameter>"
ENDS = "</function>"
# As templates of these models write such values, which Jinja writes as Python does.
PYTHONS = {"True": "true", "False": "false", "None": "null"}


def is_text(schema: object) -> bool:
    """Whether a parameter of this schema is a text as it stands."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


class Parameters:
    """Reads the parameters of one call, as they come in pieces, up to their end.

    Attributes:
        rest: what has come behind their end.
    """

    def __init__(self, texts: Collection[str]) -> None:
        """``texts``: those whose values are texts as they stand; others are JSON where they can be."""
        self._texts = texts
        self._held, self._json, self._begun = "", "", False
        self._state: Callable[[], bool] | None = self._between
        self.rest = ""

    @property
    def ended(self) -> bool:
        """Whether all are there."""
        return self._state is None

    def push(self, text: str) -> str:
        """Takes more; returns what is new of the object."""
        self._held += text
        while self._state is not None and self._state():
            pass
        new, self._json = self._json, ""
        return new

    # The states: each returns whether what is held has to be looked at again.

    def _between(self) -> bool:
        held = self._held.lstrip()
        named = NAMED.match(held)
        if named:
            self._text = named[1] in self._texts
            self._json += ", " if self._begun else "{"
            self._json += f"{json.dumps(named[1], ensure_ascii=False)}: "
            self._held, self._begun, self._state = held[named.end() :], True, self._first
            return True
        if (ENDS.startswith(held) and held != ENDS) or OPENS.startswith(held) or held.startswith(OPENS):
            return False
        # What is neither a parameter nor the end ends them too.
        self._json += "}" if self._begun else "{}"
        self.rest, self._held, self._state = held.removeprefix(ENDS), "", None
        return False

    def _first(self) -> bool:
        """A line of its own begins behind the name."""
        if not self._held:
            return False
        self._held = self._held.removeprefix("\n")
        self._json += '"' if self._text else ""
        self._state = self._value
        return True

    def _value(self) -> bool:
        value, closes, behind = self._held.partition(CLOSES)
        if closes:
            value = value.removesuffix("\n")
            self._json += f'{_inside(value)}"' if self._text else _json(value)
            self._held, self._state = behind, self._between
            return True
        if self._text:
            end = len(value) - max(overlap(value, CLOSES), overlap(value, f"\n{CLOSES}"))
            self._json, self._held = self._json + _inside(value[:end]), value[end:]
        return False


def _inside(text: str) -> str:
    """``text`` as it stands between the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json(value: str) -> str:
    value = PYTHONS.get(value.strip(), value.strip())
    try:
        json.loads(value)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    return value
