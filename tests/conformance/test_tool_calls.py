"""Calls of tools by a model that runs: those it must make, and what goes on from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate  # type: ignore[import-untyped]

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, ToolCall, Tools, whole_calls
from pyramidserve.types import ChatMessage, Compression, FinishReason, Sampling, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.tools.forced import forced_calls
from workers.tools.forms import FORMS
from workers.tools.reader import CallSyntax, ToolReader

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Paris", "Rome"]}},
}
WEATHER = Tool("weather", "The weather of a city.", PLACE)
CLOCK = Tool(
    "clock", "What time it is.", {"type": "object", "properties": {}, "additionalProperties": False}
)
ASKED = [ChatMessage("user", "How will the weather be in Rome, for 3 days?")]


@pytest.fixture(scope="module")
def engine(embedded: Path) -> Engine:
    return Engine(EngineConfig(checkpoint=str(embedded), dtype="float32", kv_bytes=256 << 20))


@pytest.mark.parametrize("choice", ["required", "weather", "clock"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_reply_that_must_call_does(choice: str, seed: int | None, engine: Engine) -> None:
    tools = Tools((WEATHER, CLOCK), choice, single=True)
    sampling = Sampling(1.5, seed=seed) if seed else Sampling()
    (reply,) = engine.generate([EngineRequest(ASKED, sampling, Stopping(200), tools=tools)])
    (call,) = reply.tool_calls
    assert (reply.text, reply.receipt.finish_reason) == ("", FinishReason.EOS)
    assert call.name == choice or choice == "required"
    assert len(call.id) == 9
    validate(json.loads(call.arguments), PLACE if call.name == "weather" else CLOCK.parameters)


@pytest.mark.parametrize("form", FORMS)
def test_grammars_have_what_each_form_writes(form: str, engine: Engine) -> None:
    tools = Tools((WEATHER, CLOCK), "required")
    grammar = forced_calls(FORMS[form], tools, json.dumps)
    request = EngineRequest("Now:", Sampling(1.0, seed=3), Stopping(200), constraint=grammar)
    (reply,) = engine.generate([request])
    said = ToolReader(CallSyntax(form, ("weather", "clock")), str).push(reply.text)
    assert not said.text
    calls = whole_calls(said.calls)
    assert calls
    for call in calls[: None if reply.receipt.finish_reason is FinishReason.EOS else -1]:
        validate(json.loads(call.arguments), PLACE if call.name == "weather" else CLOCK.parameters)


def test_the_next_turn_goes_on_from_a_call_and_its_result(engine: Engine) -> None:
    tools = Tools((WEATHER, CLOCK), "weather")
    first = EngineRequest(ASKED, stopping=Stopping(80), tools=tools, session_id="talk")
    (reply,) = engine.generate([first])
    (call,) = reply.tool_calls
    # As clients write it who have read the arguments.
    again = ToolCall("own", call.name, json.dumps(json.loads(call.arguments), indent=1))
    later = [*ASKED, ChatMessage("assistant", "", (again,)), ChatMessage("tool", "Rain.", (), "own")]
    asked = EngineRequest(later, stopping=Stopping(8), tools=Tools((WEATHER, CLOCK)), session_id="talk")
    (more,) = engine.generate([asked])
    assert more.receipt.reused_tokens >= len(reply.token_ids) + reply.receipt.prompt_tokens - 2
    # With other tools it is another prompt.
    other = EngineRequest(later, stopping=Stopping(8), tools=Tools((CLOCK,)), session_id="talk")
    (anew,) = engine.generate([other])
    assert anew.receipt.reused_tokens < reply.receipt.prompt_tokens
    engine.end_session("talk")
    engine.check_integrity()


@pytest.mark.parametrize("recall", ["off", "exact"])
def test_a_call_that_was_cut_goes_on(recall: str, engine: Engine) -> None:
    compression = Compression("pyramid", "evict", kv_keep=0.6, recall=recall)
    tools = Tools((WEATHER, CLOCK), "weather")
    request = EngineRequest(ASKED, Sampling(), Stopping(80), compression, tools=tools)
    (whole,) = engine.generate([request])
    known = whole.token_ids[:12]
    resumed = EngineRequest(ASKED, Sampling(), Stopping(80), compression, known, tools=tools)
    (rest,) = engine.generate([resumed])
    assert rest.token_ids == whole.token_ids[12:]
    (call,) = whole.tool_calls
    (tail,) = rest.tool_calls
    assert tail.arguments
    assert call.arguments.endswith(tail.arguments)


def test_a_schema_that_cannot_be_is_refused(engine: Engine) -> None:
    tools = Tools((Tool("f", "", {"type": "objct"}),), "f")
    with pytest.raises(InvalidRequestError, match="objct"):
        engine.submit(EngineRequest(ASKED, tools=tools))


def test_a_template_without_tools_is_told_of_them_in_messages(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    text = tokenizer.render(Chat.of(ASKED, tools=Tools((WEATHER,))))
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert text.index("Tools") < text.index("<|im_start|>user")
    called = ChatMessage("assistant", "", (ToolCall("a", "weather", '{"city": "Rome"}'),))
    results = [ChatMessage("tool", each, (), "a") for each in ("Rain.", "Sun.")]
    text = tokenizer.render(Chat.of([*ASKED, called, *results]))
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert text.count("<|im_start|>user") == 2
    assert "<tool_response>\nRain.\n</tool_response>\n<tool_response>\nSun." in text
