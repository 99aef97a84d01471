"""Tells the calls of tools in a reply from its text, as both come."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from pyramidserve.tools import ToolCallPart
from workers.overlap import overlap
from workers.tools.forms import FORMS, CallForm
from workers.tools.json_end import JsonEnd
from workers.tools.parameters import Parameters

# A call up to its arguments, where those come last and are an object, as they nearly always do.
HEAD = r'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{}"\s*:\s*(?=\{{)'


@dataclass(frozen=True)
class CallSyntax:
    """How tools are called in a reply.

    Attributes:
        form: a name of ``FORMS``.
        names: tools that may be called; other calls are text.
        single: of several calls, the first alone counts.
        texts: parameters that are texts, as in "tool:parameter", where the form does not say which are.
    """

    form: str
    names: tuple[str, ...]
    single: bool = False
    texts: tuple[str, ...] = ()

    def texts_of(self, name: str) -> set[str]:
        """Parameters of a tool that are texts."""
        pairs = (text.split(":", 1) for text in self.texts)
        return {parameter for tool, parameter in pairs if tool == name}


@dataclass(frozen=True)
class Said:
    """What is new of a reply."""

    text: str = ""
    calls: tuple[ToolCallPart, ...] = ()

    def __add__(self, other: "Said") -> "Said":
        return Said(self.text + other.text, self.calls + other.calls)


class ToolReader:
    """Reads one reply. What turns out to be no call of a known tool is text, to the letter."""

    def __init__(self, syntax: CallSyntax, name: Callable[[int], str]) -> None:
        """``name``: what the server calls the reply's n-th call."""
        self._syntax, self._name = syntax, name
        self._form: CallForm = FORMS[syntax.form]
        self._head = re.compile(self._form.head or HEAD.format(self._form.arguments))
        self._held, self._seen = "", 0
        # What is text after all if no call follows.
        self._opened = ""
        self._state: Callable[[], bool] = self._begin if self._form.bare else self._text
        self._end = JsonEnd()
        self._parameters = Parameters(())
        self._count = 0
        self._said, self._calls = "", list[ToolCallPart]()

    def push(self, text: str) -> Said:
        """Takes more of the reply; returns what is certain now."""
        self._held += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> Said:
        """What was held back, once the reply is complete."""
        if self._state in (self._begin, self._text):
            self._said += self._held
        elif self._opened:
            self._said += self._opened + self._held
        self._held = ""
        return self._take()

    def _take(self) -> Said:
        said = Said(self._said, tuple(self._calls))
        self._said, self._calls = "", []
        return said

    # The states: each returns whether what is held has to be looked at again.

    def _begin(self) -> bool:
        begun = self._held.lstrip()
        if begun:
            self._state = self._between if begun[0] == "{" else self._text
        return bool(begun)

    def _text(self) -> bool:
        opens = self._form.opens
        before, found, behind = self._held.partition(opens)
        if found:
            self._said, self._held, self._opened = self._said + before, behind, opens
            self._state = self._between
            return True
        keep = overlap(self._held, opens)
        end = len(self._held) - keep
        self._said, self._held = self._said + self._held[:end], self._held[end:]
        return False

    def _between(self) -> bool:
        form, held = self._form, self._held
        rest = held.lstrip(" \n\r\t" + form.between)
        if not rest:
            return False
        for mark in filter(None, (form.closes, form.opens)):
            if rest.startswith(mark):
                self._held = rest[len(mark) :]
                self._opened = mark if mark == form.opens else ""
                return True
            if mark.startswith(rest):
                return False
        skipped, self._held = held[: len(held) - len(rest)], rest
        if self._opened if form.head else rest[0] == "{" and (self._opened or not form.closes):
            self._opened, self._seen, self._end = self._opened + skipped, 0, JsonEnd()
            self._state = self._named if form.head else self._object
        else:
            self._said += self._opened + skipped if self._opened else ""
            self._opened, self._state = "", self._text
        return True

    def _object(self) -> bool:
        head = self._head.match(self._held)
        name = json.loads(head[1]) if head else ""
        if head and name in self._syntax.names:
            self._call(ToolCallPart(self._count, self._name(self._count), name))
            self._held, self._end, self._opened = self._held[head.end() :], JsonEnd(), ""
            self._state = self._arguments
            return True
        end = self._end.find(self._held[self._seen :])
        if end is None:
            self._seen = len(self._held)
            return False
        whole, self._held = self._held[: self._seen + end], self._held[self._seen + end :]
        call = self._whole(whole)
        if call:
            self._call(call)
            self._count += 1
            self._state = self._between
        else:
            self._said += self._opened + whole
            self._state = self._text
        self._opened = ""
        return True

    def _named(self) -> bool:
        head = self._head.match(self._held)
        if head and head[1] in self._syntax.names:
            self._call(ToolCallPart(self._count, self._name(self._count), head[1]))
            self._held, self._end, self._opened = self._held[head.end() :], JsonEnd(), ""
            self._parameters = Parameters(self._syntax.texts_of(head[1]))
            self._state = self._one_by_one if self._form.parameters else self._arguments
            return True
        decided = self._form.decides in self._held
        if decided:
            self._said, self._opened, self._state = self._said + self._opened, "", self._text
        return decided

    def _one_by_one(self) -> bool:
        new = self._parameters.push(self._held)
        if new:
            self._call(ToolCallPart(self._count, arguments=new))
        self._held = self._parameters.rest
        if self._parameters.ended:
            self._count += 1
            self._state = self._between
        return self._parameters.ended

    def _arguments(self) -> bool:
        end = self._end.find(self._held)
        new = self._held[:end]
        if new:
            self._call(ToolCallPart(self._count, arguments=new))
        self._held = self._held[len(new) :]
        if end is not None:
            self._count += 1
            self._end = JsonEnd(depth=1)
            self._state = self._between if self._form.head else self._rest
        return end is not None

    def _rest(self) -> bool:
        # What comes behind the arguments, as the name that a model may give its call.
        end = self._end.find(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._state = self._between
        return end is not None

    def _whole(self, text: str) -> ToolCallPart | None:
        try:
            read = json.loads(text)
        except ValueError:
            return None
        arguments = read.get(self._form.arguments, {})
        if read.get("name") not in self._syntax.names or not isinstance(arguments, dict | str):
            return None
        said = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return ToolCallPart(self._count, self._name(self._count), read["name"], said)

    def _call(self, part: ToolCallPart) -> None:
        if self._syntax.single and self._count:
            return
        last = self._calls[-1] if self._calls else None
        if last and last.index == part.index:
            self._calls[-1] = ToolCallPart(last.index, last.id, last.name, last.arguments + part.arguments)
        else:
            self._calls.append(part)
