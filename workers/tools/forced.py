"""Grammars of replies that must call tools."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyramidserve.tools import Tool, Tools
from pyramidserve.types import Constraint
from workers.tools.forced_parameters import DEFINITIONS, parameter_rules
from workers.tools.forms import MISTRAL, MISTRAL_ARGS, CallForm

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# As models have read most of it; blanks that are free are written without end by some.
JSON_FORM: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


def forced_calls(form: CallForm, tools: Tools, mark: Callable[[str], str]) -> Constraint:
    """The grammar, in Lark's as llguidance has it, of a reply that is calls of ``tools.usable``.

    ``mark``: how the grammar names what is the form's. Raises InvalidRequestError where there is none.
    """
    opens = mark(form.opens)
    many = tools.choice == "required" and not tools.single
    if form.closes:
        call, calls = f'{opens} "\\n" object "\\n" {json.dumps(form.closes)}', 'call ("\\n" call)*'
    elif form is MISTRAL:
        call, calls = "object", f'{opens} " [" call (", " call)* "]"'
    elif form is MISTRAL_ARGS:
        call, calls = f"{opens} object", "call+"
    else:
        call, calls = "object", 'call ("; " call)*'
    if not many:
        calls = f'{opens} " [" call "]"' if form is MISTRAL else "call"
    usable = tools.usable
    names = " | ".join(f"object{number}" for number in range(len(usable)))
    lines = [f"start: {calls}", f"call: {call}", f"object: {names}"]
    for number, tool in enumerate(usable):
        rule = f"object{number}"
        if form.parameters:
            head = json.dumps(f"<function={tool.name}>\n")
            lines.append(f'{rule}: {head} {rule}_all "</function>"')
            lines += parameter_rules(f"{rule}_all", tool, JSON_FORM)
        else:
            head = f"{json.dumps(tool.name)} {mark('[ARGS]')} " if form is MISTRAL_ARGS else ""
            lines.append(f"{rule}: {head}%json {json.dumps(_object(tool, form))}")
    return Constraint("grammar", "\n".join(lines))


def _object(tool: Tool, form: CallForm) -> dict[str, object]:
    parameters = dict(tool.parameters) or {"type": "object"}
    if form is MISTRAL_ARGS:
        return {"x-guidance": JSON_FORM, "type": "object"} | parameters
    # References in it count from the top.
    moved = {name: parameters.pop(name) for name in DEFINITIONS if name in parameters}
    return moved | {
        "x-guidance": JSON_FORM,
        "type": "object",
        "properties": {"name": {"const": tool.name}, form.arguments: parameters},
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }
