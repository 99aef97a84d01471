"""Calls whose parameters are written one by one can be held to most schemas; others are refused by name."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, Tools
from workers.tools.forced import forced_calls
from workers.tools.forms import QWEN_CODER

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "what": {"type": "string", "maxLength": 5},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"$ref": "#/$defs/days"},
        "any": True,
        "never": False,
    },
    "required": ["what", "unit"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "maximum": 9}},
}
NOTHING = Tool("nothing", "", {"properties": {"a": False}})
TOOLS = Tools((Tool("find", "", PARAMETERS), Tool("look"), NOTHING), "required")
BYTES = LLTokenizer("byte")


def fits(reply: str) -> bool:
    """Whether a grammar of ``TOOLS`` allows a whole reply."""
    grammar = forced_calls(QWEN_CODER, TOOLS, json.dumps)
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar.text))
    assert not matcher.get_error()
    ids = BYTES.tokenize_bytes(reply.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def call(name: str, **parameters: str) -> str:
    """A call as such models write it."""
    told = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{told}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("reply", "allowed"),
    [
        (call("find", what="a\n<b\n", unit="C"), True),
        (call("find", what="", unit="F", days="3", any='{"a": 1}'), True),
        (call("look") + "\n" + call("find", what="x", unit="C"), True),
        (call("find", what="abcdef", unit="C"), False),
        (call("find", what="x", unit="K"), False),
        (call("find", what="x", unit="C", days="10"), False),
        (call("find", what="x", unit="C", days='"3"'), False),
        (call("find", unit="C"), False),
        (call("find", what="x", unit="C", more="1"), False),
        (call("find", what="x", unit="C", never="1"), False),
        (call("find", what="x", unit="C", never=""), False),
        (call("nothing"), True),
        (call("nothing", a="1"), False),
        (call("other"), False),
        ("Well.", False),
    ],
)
def test_a_reply_is_held_to_the_schemas(reply: str, allowed: bool) -> None:
    assert fits(reply) is allowed


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"anyOf": [{}]}, "parameters of tool 'f' has 'anyOf'"),
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "a of tool 'f' has 'pattern'"),
        ({"properties": 5}, "properties in the schema of tool 'f' is 5; it must be a dict"),
        ({"required": "a", "properties": {}}, "required in the schema of tool 'f' is 'a'"),
        (
            {"properties": {"a": False}, "required": ["a"]},
            "a of tool 'f' is required, but its schema is false",
        ),
        ({"properties": {"a": {"type": "string", "enum": 1}}}, "enum in the schema of tool 'f' is 1"),
    ],
)
def test_what_cannot_be_held_to_is_named(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        forced_calls(QWEN_CODER, Tools((Tool("f", "", schema),), "f"), json.dumps)
