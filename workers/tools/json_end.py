"""Where a JSON object ends that comes in pieces."""


class JsonEnd:
    """Finds the end of an object, from its first brace on or from within."""

    def __init__(self, depth: int = 0) -> None:
        """``depth``: braces that are open already."""
        self._depth = depth
        self._quoted = self._escaped = False

    def find(self, text: str) -> int | None:
        """How much of ``text``, behind all before it, is of the object; None: all, and more is to come."""
        for at, letter in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._quoted = False
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None
