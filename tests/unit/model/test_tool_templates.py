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
from pyramidserve.tools import Tool, ToolCall, Tools
from pyramidserve.types import ChatMessage
from workers.model.tokenizer import Tokenizer
from workers.model.transcript import Transcript
from workers.tools.settle import settle_tools

SPECIAL = ("<s>", "</s>", "[TOOL_CALLS]", "<|im_end|>")
TOLD = "{% if tools %}{% for t in tools %}{{ t.function.name }}:{{ t | tojson }}\n{% endfor %}{% endif %}"
BODY = (
    "{% for m in messages %}{{ m.role }}{% if thinking %}!{% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls %}MARK[{{ c.function | tojson }}]{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
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
