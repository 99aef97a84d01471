"""Tools in chat templates that know of them; nobody types a control token there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from pyramidserve.tools import Tool, ToolCall, Tools, whole_calls
from pyramidserve.types import ChatMessage
from workers.model.tokenizer import Tokenizer
from workers.model.transcript import Transcript
from workers.tools.reader import ToolReader
from workers.tools.settle import settle_tools

SPECIAL = ("<s>", "</s>", "[TOOL_CALLS]", "<|im_end|>", "[ARGS]")
TOLD = "{% if tools %}{% for t in tools %}{{ t.function.name }}:{{ t | tojson }}\n{% endfor %}{% endif %}"
BODY = (
    "{% for m in messages %}{{ m.role }}{% if thinking %}!{% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls %}MARK[{{ c.function | tojson }}]{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Mistral's newer templates and those of Qwen's models for code write calls.
ARGS = (
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
)
ONE_BY_ONE = (
    "{% for c in m.tool_calls %}{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{% for name in c.function.arguments %}{% set value = c.function.arguments[name] %}"
    "{{ '<parameter=' + name + '>\\n' }}{% set value = value | tojson | safe if value is mapping or "
    "(value is sequence and value is not string) else value | string %}{{ value }}"
    "{{ '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}"
)
CALL = ToolCall("a", "find", '{"what": "x</s>y<|im_end|>"}')
CALLED = [ChatMessage("user", "Go."), ChatMessage("assistant", "", (CALL,)), ChatMessage("tool", "Done.")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A tokenizer with a chat template."""

    def write(template: str) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        symbols = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend = Backend(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
        fast.add_tokens([AddedToken(each, special=True, normalized=False) for each in SPECIAL[2:]])
        fast.chat_template = template
        fast.save_pretrained(folder)
        return Tokenizer(folder)

    return write


def test_a_template_has_tools_and_variables(written: Callable[[str], Tokenizer]) -> None:
    tokenizer = written(TOLD + BODY.replace("MARK", "[TOOL_CALLS]"))
    chat = Chat.of(CALLED, tools=Tools((Tool("find", "Finds."),)), variables={"thinking": True})
    text = tokenizer.render(chat)
    assert text.startswith('find:{"type": "function", "function": {"name": "find"')
    assert "user!: Go." in text
    syntax, held = settle_tools(chat, tokenizer)
    assert (syntax and syntax.form, held) == ("mistral", None)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        tokenizer.render(Chat.of(CALLED, variables={"tokenize": True}))


def test_arguments_that_name_control_tokens_are_text(written: Callable[[str], Tokenizer]) -> None:
    tokenizer = written(TOLD + BODY.replace("MARK", "[TOOL_CALLS]"))
    ids = tokenizer.chat(Chat.of(CALLED))
    end, opens, other = (ids.count(SPECIAL.index(each)) for each in ("</s>", "[TOOL_CALLS]", "<|im_end|>"))
    assert (end, opens, other) == (3, 1, 0)
    assert json.loads(CALL.arguments)["what"] in tokenizer.decode(ids)
    broken = ChatMessage("assistant", "", (ToolCall("a", "find", "{cut"),))
    with pytest.raises(InvalidRequestError, match="cut', which is no JSON"):
        tokenizer.chat(Chat.of([CALLED[0], broken, CALLED[2]]))


def test_what_opens_calls_is_text_though_it_is_special(written: Callable[[str], Tokenizer]) -> None:
    tokenizer = written(TOLD + BODY.replace("MARK", "[TOOL_CALLS]"))
    mark = SPECIAL.index("[TOOL_CALLS]")
    assert tokenizer.decode([0, mark, *tokenizer.encode_part("[{"), 1]) == "[TOOL_CALLS][{"
    assert tokenizer.call_mark("[TOOL_CALLS]") == f"<[{mark}]>"
    # Hermes' is text anyway.
    assert written(TOLD + BODY.replace("MARK", "<tool_call>")).call_mark("<tool_call>") == '"<tool_call>"'


def of_calls(template: str) -> str:
    """``BODY`` with calls that are written otherwise."""
    first, _, rest = BODY.partition("{% for c in m.tool_calls %}")
    return first + template + rest.partition("]")[2]


ASKED = {"what": {"type": "string"}, "days": {"type": "integer"}, "any": {}}
TAKEN = {"what": 'a "b"\n', "days": 3, "any": [True, {"x": "y"}]}


@pytest.mark.parametrize(("form", "written_so"), [("mistral-args", ARGS), ("qwen-coder", ONE_BY_ONE)])
def test_calls_are_read_as_the_template_writes_them(
    form: str, written_so: str, written: Callable[[str], Tokenizer]
) -> None:
    tokenizer = written(TOLD + of_calls(written_so))
    tools = Tools((Tool("find", "", {"type": "object", "properties": ASKED}), Tool("look")))
    chat = Chat.of([ChatMessage("user", "Go.")], tools=tools)
    calls = tuple(ToolCall("", "find", json.dumps(each)) for each in (TAKEN, {"days": 4}))
    said = Chat.of([*chat.messages, ChatMessage("assistant", "Hm. ", calls)], False, tools)
    before, ids = tokenizer.chat(chat), tokenizer.chat(said)
    assert ids[: len(before)] == before
    syntax, _ = settle_tools(chat, tokenizer)
    assert syntax
    assert syntax.form == form
    reader = ToolReader(syntax, str)
    reply = ids[len(before) : len(before) + ids[len(before) :].index(SPECIAL.index("</s>"))]
    told = reader.push(tokenizer.decode(reply)) + reader.finish()
    assert told.text == "Hm. "
    assert [json.loads(call.arguments) for call in whole_calls(told.calls)] == [TAKEN, {"days": 4}]


def test_what_calls_of_newer_models_can_be_held_to(written: Callable[[str], Tokenizer]) -> None:
    tools = Tools((Tool("find", "", {"type": "object", "properties": ASKED}),), "find")
    chat = Chat.of([ChatMessage("user", "Go.")], tools=tools)
    _, held = settle_tools(chat, written(TOLD + of_calls(ARGS)))
    mark, args = (SPECIAL.index(each) for each in ("[TOOL_CALLS]", "[ARGS]"))
    assert held
    assert held.text.startswith(f"start: call\ncall: <[{mark}]> object\n")
    assert f'object0: "find" <[{args}]> %json {{"x-guidance"' in held.text
    _, held = settle_tools(chat, written(TOLD + of_calls(ONE_BY_ONE)))
    assert held
    assert r'object0: "<function=find>\n" object0_all "</function>"' in held.text
    assert "object0_all: object0_all_0? object0_all_1? object0_all_2?" in held.text


def test_the_next_turn_has_the_call_as_it_was_written(written: Callable[[str], Tokenizer]) -> None:
    tokenizer = written(TOLD + BODY.replace("MARK", "[TOOL_CALLS]"))
    asked = Chat.of([CALLED[0]])
    said = [2, *tokenizer.encode_part('[{"name":"find","arguments":{"what":1}}]'), 1]
    call = ToolCall("a", "find", '{"what":1}')
    last = Transcript.of(asked, "", tokenizer.chat(asked), said, (call,))
    later = Chat.of([CALLED[0], ChatMessage("assistant", "", (call,)), CALLED[2]])
    ids = tokenizer.chat(later, last)
    assert ids == [*tokenizer.chat(asked), *said, *tokenizer.encode_part("tool: Done."), 1, *ids[-11:]]
    assert tokenizer.decode(ids[-11:]) == "assistant: "


def test_a_form_that_is_not_known_is_refused(written: Callable[[str], Tokenizer]) -> None:
    tokenizer = written(TOLD + BODY.replace("MARK", "<function="))
    assert tokenizer.calls is None
    with pytest.raises(InvalidRequestError, match="form that is not known here"):
        settle_tools(Chat.of(CALLED, tools=Tools((Tool("find"),))), tokenizer)
    assert tokenizer.chat(Chat.of(CALLED[:1]))
