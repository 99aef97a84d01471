"""Functions that a model may call, and the calls that it writes."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyramidserve.errors import InvalidRequestError

MOST_TOOLS = 128
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Tool:
    """A function; ``parameters``: a JSON schema of the object that it takes."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tools:
    """What a reply may call.

    Attributes:
        choice: "auto", the model decides; "none"; "required", one at least; or the name of a tool, which it
            calls once.
        single: of several calls in a reply, the first alone counts.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    single: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidRequestError where they cannot be."""
        if len(self.tools) > MOST_TOOLS:
            raise InvalidRequestError(
                f"there are {len(self.tools)} tools; at most {MOST_TOOLS} are allowed"
            )
        names = [tool.name for tool in self.tools]
        for name in names:
            if not NAME.fullmatch(name) or name in CHOICES or names.count(name) > 1:
                raise InvalidRequestError(
                    f"tool name {name!r:.80} cannot be; give each a name of its own, of 1 to 64 letters, "
                    f"digits, '_', '-' and '.', and none of {', '.join(CHOICES)}"
                )
        if self.choice not in (*CHOICES, *names):
            known = ", ".join((*CHOICES, *names[:8]))
            raise InvalidRequestError(f"tool_choice is {self.choice!r:.80}; it must be one of {known}")
        if self.forced and not self.tools:
            raise InvalidRequestError("tool_choice is 'required', and there are no tools; give some")

    @property
    def forced(self) -> bool:
        """Whether the reply is calls and nothing else."""
        return self.choice not in ("auto", "none")

    @property
    def usable(self) -> tuple[Tool, ...]:
        """Those that the reply may call."""
        named = tuple(tool for tool in self.tools if tool.name == self.choice)
        return () if self.choice == "none" else named or self.tools


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant has written; ``arguments``: a JSON object, as it wrote it."""

    id: str
    name: str
    arguments: str

    @property
    def said(self) -> tuple[str, str]:
        """What is called with what, equal where that is, however it is written."""
        try:
            return self.name, json.dumps(json.loads(self.arguments), sort_keys=True)
        except ValueError:
            return self.name, self.arguments


@dataclass(frozen=True)
class ToolCallPart:
    """What is new of the ``index``-th call of a reply: the first part names it, all have more arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


def whole_calls(parts: Iterable[ToolCallPart]) -> tuple[ToolCall, ...]:
    """The calls that ``parts`` make up."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        call = calls.get(part.index, ToolCall("", "", ""))
        calls[part.index] = ToolCall(
            call.id or part.id, call.name or part.name, call.arguments + part.arguments
        )
    return tuple(calls.values())


def read_tools(
    tools: Sequence[Tool | Mapping[str, Any]], choice: str = "auto", single: bool = False
) -> Tools:
    """Tools, or what OpenAI's API has for them. Raises InvalidRequestError."""
    return Tools(tuple(map(_tool, tools)), choice, single)


def read_tool_calls(calls: Iterable[ToolCall | Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """Calls, or what OpenAI's API has for them. Raises InvalidRequestError."""
    return tuple(map(_call, calls))


def _tool(item: Tool | Mapping[str, Any]) -> Tool:
    if isinstance(item, Tool):
        return item
    match item:
        case {"type": "function", "function": {"name": str(name), **rest}}:
            description, parameters = rest.get("description") or "", rest.get("parameters") or {}
            if isinstance(description, str) and isinstance(parameters, Mapping):
                return Tool(name, description, parameters)
    raise InvalidRequestError(
        f"tools has {dict(item)!r:.200}; a tool is {{'type': 'function', 'function': {{'name': …, "
        "'description': …, 'parameters': a JSON schema}}}"
    )


def _call(item: ToolCall | Mapping[str, Any]) -> ToolCall:
    if isinstance(item, ToolCall):
        return item
    match item:
        case {"function": {"name": str(name), "arguments": str(arguments)}, **rest}:
            return ToolCall(str(rest.get("id") or ""), name, arguments)
    raise InvalidRequestError(
        f"tool_calls has {dict(item)!r:.200}; a call is {{'id': …, 'type': 'function', 'function': "
        "{'name': …, 'arguments': a text of JSON}}"
    )
