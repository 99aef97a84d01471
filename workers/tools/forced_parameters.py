"""Grammars of parameters that are written one by one, see ``workers.tools.parameters``."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool
from workers.tools.parameters import CLOSES, OPENS, is_text

Kind = TypeVar("Kind", dict[str, Any], list[Any])

# What the schemas may say that a grammar of these can hold them to, or that holds nothing.
NOTES = {"title", "description", "default", "examples", "$schema", "$comment"}
DEFINITIONS = ("$defs", "definitions")
OF_ALL = NOTES | {*DEFINITIONS, "type", "properties", "required", "additionalProperties"}
OF_TEXTS = NOTES | {"type", "enum", "minLength", "maxLength"}
END = json.dumps(f"\n{CLOSES}\n")


def parameter_rules(rule: str, tool: Tool, json_form: Mapping[str, Any]) -> list[str]:
    """Rules in Lark's form, the first of which is ``rule``: the parameters of ``tool``, in their order.

    ``json_form``: how JSON is written. Raises InvalidRequestError where they cannot be held to the schema.
    """
    schema = dict(tool.parameters)
    _check(tool, "parameters", schema, OF_ALL)
    required = _read(tool, schema, "required", list, [])
    more = {"x-guidance": json_form} | {name: schema[name] for name in DEFINITIONS if name in schema}
    parts, lines = [], []
    for number, (name, own) in enumerate(_read(tool, schema, "properties", dict, {}).items()):
        if own is False:  # no value fits, so that it may not be given
            if name in required:
                raise InvalidRequestError(
                    f"tool_choice asks for calls, and {name} of tool {tool.name!r} is required, but "
                    "its schema is false, which no value fits; do not require it, or let the model decide"
                )
            continue
        part, begin = f"{rule}_{number}", json.dumps(f"{OPENS}{name}>\n")
        parts.append(part if name in required else f"{part}?")
        lines.append(f"{part}: {begin} {part}_value")
        if not is_text(own):
            lines.append(f"{part}_value: %json {json.dumps({**more, **_of_schema(own)})} {END}")
            continue
        _check(tool, name, own, OF_TEXTS)
        if "enum" in own:
            choices = _read(tool, own, "enum", list, [])
            texts = " | ".join(json.dumps(each) for each in choices if isinstance(each, str))
            lines.append(f"{part}_value: ({texts}) {END}")
        else:
            least, most = own.get("minLength", 0), own.get("maxLength", "")
            lines.append(f"{part}_value[suffix={END}]: /(?s:.{{{least},{most}}})/")
    whole = " ".join(parts) or '""'
    return [f"{rule}: {whole}", *lines]


def _of_schema(schema: object) -> Mapping[str, Any]:
    """A schema as an object, which true is too."""
    return schema if isinstance(schema, Mapping) else {}


def _read(tool: Tool, schema: Mapping[str, Any], name: str, kind: type[Kind], silent: Kind) -> Kind:
    value = schema.get(name, silent)
    if not isinstance(value, kind):
        raise InvalidRequestError(
            f"{name} in the schema of tool {tool.name!r} is {value!r:.80}; it must be a {kind.__name__}"
        )
    return value


def _check(tool: Tool, what: str, schema: Mapping[str, Any], known: set[str]) -> None:
    others = sorted(schema.keys() - known)
    if others:
        raise InvalidRequestError(
            f"tool_choice asks for calls, and {what} of tool {tool.name!r} has {others[0]!r}, to which "
            "calls of this model's form cannot be held; leave that out, or let the model decide"
        )
