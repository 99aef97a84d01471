"""Calls of tools are told from text, however a reply comes in pieces."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.tools import ToolCall, whole_calls
from workers.tools.forms import FORMS, HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_CODER, form_of
from workers.tools.parameters import Parameters
from workers.tools.reader import CallSyntax, Said, ToolReader

NAMES = ("find", "weather")
ARGUMENTS = {"city": 'Pa"r}is{', "days": [1, {"a": "]"}], "no": None}
FIND = ("find", "{}")
WEATHER = ("weather", json.dumps(ARGUMENTS))


def read(form: str, pieces: list[str], single: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of a reply in pieces."""
    syntax = CallSyntax(form, NAMES, single, ("weather:city", "find:days"))
    reader = ToolReader(syntax, lambda number: f"call{number}")
    said = sum((reader.push(piece) for piece in pieces), Said()) + reader.finish()
    calls = whole_calls(said.calls)
    assert [call.id for call in calls] == [f"call{number}" for number in range(len(calls))]
    return said.text, [(call.name, call.arguments) for call in calls]


def written(form: str, *calls: tuple[str, str]) -> str:
    """How a model of ``form`` writes calls."""
    if form == "qwen-coder":
        return "\n".join(one_by_one(name, json.loads(arguments)) for name, arguments in calls)
    if form == "mistral-args":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    named = [f'{{"name": "{name}", "{FORMS[form].arguments}": {arguments}}}' for name, arguments in calls]
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in named)
    return f"[TOOL_CALLS] [{', '.join(named)}]" if form == "mistral" else "; ".join(named)


def one_by_one(name: str, arguments: dict[str, Any]) -> str:
    """A call as the template of Qwen's models for code writes it."""
    told = "".join(
        f"<parameter={key}>\n{json.dumps(each) if isinstance(each, list | dict) else each}\n</parameter>\n"
        for key, each in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{told}</function>\n</tool_call>"


@pytest.mark.parametrize("form", FORMS)
@given(cuts=st.lists(st.integers(0, 400)))
def test_calls_are_the_same_in_any_pieces(form: str, cuts: list[int]) -> None:
    reply = written(form, WEATHER, FIND)
    places = sorted({0, len(reply), *(cut % len(reply) for cut in cuts)})
    pieces = [reply[first:end] for first, end in pairwise(places)]
    assert read(form, pieces) == ("", [WEATHER, FIND])


@pytest.mark.parametrize("form", [name for name in FORMS if name != "qwen-coder"])
def test_arguments_come_as_they_are_written(form: str) -> None:
    reader = ToolReader(CallSyntax(form, NAMES), str)
    first, _, rest = written(form, WEATHER).partition('"no"')
    (part,) = reader.push(first).calls
    assert (part.name, part.arguments) == ("weather", WEATHER[1].partition('"no"')[0])
    (more,) = reader.push('"no"' + rest).calls
    assert (more.index, more.id, more.name) == (0, "", "")
    assert part.arguments + more.arguments == WEATHER[1]


def test_a_text_that_is_a_parameter_comes_as_it_is_written() -> None:
    reader = ToolReader(CallSyntax("qwen-coder", NAMES, texts=("find:what",)), str)
    said = [
        "".join(part.arguments for part in reader.push(piece).calls)
        for piece in ("<tool_call>\n<function=find>\n<parameter=what>", "\nLi", 'ne "1"\n', "Line 2\n</par")
    ]
    assert said == ['{"what": ', '"Li', 'ne \\"1\\"', "\\nLine 2"]
    rest = reader.push("ameter>\n</function>\n</tool_call>\nDone.") + reader.finish()
    assert [part.arguments for part in rest.calls] == ['"}']
    assert rest.text == "Done."


@given(
    values=st.dictionaries(
        st.text(st.characters(exclude_characters=">\n", codec="utf-8"), max_size=5),
        st.text(max_size=20).filter(lambda text: "</parameter>" not in text),
        max_size=3,
    ),
    cuts=st.lists(st.integers(0, 400)),
)
def test_texts_that_are_parameters_are_what_they_were(values: dict[str, str], cuts: list[int]) -> None:
    reply = one_by_one("find", values).partition("<function=find>")[2]
    places = sorted({0, len(reply), *(cut % len(reply) for cut in cuts)})
    reader = Parameters(values)
    told = "".join(reader.push(reply[first:end]) for first, end in pairwise(places) if not reader.ended)
    assert reader.ended
    assert json.loads(told) == values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3", 3),
        ("True", True),
        ("false", False),
        ("None", None),
        ('"3"', "3"),
        ("[1, 2", "[1, 2"),
        ("a b", "a b"),
    ],
)
def test_values_of_no_known_type_are_json_where_they_can_be(written: str, value: object) -> None:
    told = Parameters(()).push(f"\n<parameter=x>\n{written}\n</parameter>\n</function>")
    assert json.loads(told) == {"x": value}


@pytest.mark.parametrize("form", FORMS)
def test_of_several_calls_the_first_alone_counts_where_that_is_asked(form: str) -> None:
    assert read(form, [written(form, WEATHER, FIND)], single=True) == ("", [WEATHER])


@pytest.mark.parametrize(
    ("form", "reply"),
    [
        ("hermes", "Nothing <tool_cal of the sort"),
        ("hermes", "<tool_call>\nno object"),
        ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call> and more'),
        ("hermes", '<tool_call>\n{"name": "find", "argu'),
        ("hermes", '<tool_call>\n{"name": "find", "arguments": 3}\n</tool_call>'),
        ("hermes", '{"name": "find", "arguments": {}}'),
        ("hermes", '<tool_call>{"name": find}</tool_call>'),
        ("llama", '{"answer": [42, "}"]} is it'),
        ("llama", 'I say {"name": "find", "parameters": {}}'),
        ("llama", '  {"name": "fi'),
        ("mistral", "[TOOL_CALLS] ["),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", 'It is [1, 2] {"name": "find"}'),
        ("mistral-args", "[TOOL_CALLS]find[AR"),
        ("mistral-args", '[TOOL_CALLS]other[ARGS]{"a": 1} and more'),
        ("mistral-args", "find[ARGS]{}"),
        ("qwen-coder", "<tool_call>\n<function=other>\n</function>\n</tool_call>"),
        ("qwen-coder", "<tool_call>\n<funct"),
        ("qwen-coder", "<function=find>\n</function>"),
        ("qwen-coder", '<tool_call>\n{"name": "find", "arguments": {}}'),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(form: str, reply: str) -> None:
    assert read(form, [reply]) == (reply, [])
    assert read(form, list(reply)) == (reply, [])


@pytest.mark.parametrize(
    ("form", "reply", "text", "calls"),
    [
        ("hermes", f"Let me see.\n{written('hermes', FIND)}", "Let me see.\n", [FIND]),
        ("hermes", f"{written('hermes', FIND)}\nDone.", "Done.", [FIND]),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": 1}, "name": "find"}</tool_call>',
            "",
            [("find", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}', "", [("find", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "find"}</tool_call>', "", [FIND]),
        ("hermes", '<tool_call>{"name": "find", "arguments": {"a', "", [("find", '{"a')]),
        ("llama", '<|python_tag|>{"name": "find", "parameters": {}}', "", [FIND]),
        ("mistral", '[TOOL_CALLS][{"name": "find", "arguments": {}, "id": "abcdefghi"}]', "", [FIND]),
        ("mistral", f"Well. {written('mistral', FIND)}", "Well. ", [FIND]),
        ("mistral-args", '[TOOL_CALLS]find[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [("find", '{"a": 1}')]),
        ("mistral-args", f"Well. {written('mistral-args', FIND)} Done.", "Well. Done.", [FIND]),
        ("qwen-coder", f"Well.\n{written('qwen-coder', FIND)}\nDone.", "Well.\nDone.", [FIND]),
        (
            "qwen-coder",
            "<tool_call><function=find><parameter=days>3</parameter></function></tool_call>",
            "",
            [("find", '{"days": "3"}')],
        ),
        ("qwen-coder", "<tool_call>\n<function=find>\n<parameter=days>\n3", "", [("find", '{"days": "3')]),
        ("qwen-coder", "<tool_call>\n<function=find>\nWhat?\n", "What?\n", [FIND]),
    ],
)
def test_what_models_write_beside_calls(
    form: str, reply: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [reply]) == (text, calls)
    assert read(form, list(reply)) == (text, calls)


def test_templates_give_their_form_away() -> None:
    qwen = "{%- if tools %}For each call return <tool_call>{%- endif %}"
    llama = """{{- '{"name": "' + call.name + '", ' }}{{- '"parameters": ' }}"""
    assert form_of(qwen) is HERMES
    assert form_of(llama) is LLAMA
    assert form_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert form_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is MISTRAL_ARGS
    assert form_of("<tool_call>\n<function={{ name }}>\n<parameter={{ key }}>") is QWEN_CODER
    assert form_of("<tool_call>\n<function={{ name }}>{{ arguments }}") is None
    assert form_of("{% if tools %}{{ tools }}{% endif %}") is None


def test_calls_are_the_same_however_they_are_written() -> None:
    assert ToolCall("a", "f", '{"x":1, "y" : 2}').said == ToolCall("b", "f", '{"y": 2, "x": 1}').said
    assert ToolCall("a", "f", '{"x": 1}').said != ToolCall("a", "f", '{"x": 2}').said
    assert ToolCall("a", "f", "{cut").said == ("f", "{cut")
