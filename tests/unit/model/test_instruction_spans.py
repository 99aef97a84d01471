"""Which tokens of a conversation are its instructions, however it is written and encoded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.types import ChatMessage, Role
from workers.budget.span import Span
from workers.model.spans import instruction_spans


def spans(text: str, *said: tuple[Role, str], width: int = 1) -> list[str]:
    """What the instructions are in ``text``, tokens of ``width`` bytes each."""
    raw = text.encode()
    pieces = [raw[first : first + width] for first in range(0, len(raw), width)]
    messages = [ChatMessage(role, content) for role, content in said]
    found = instruction_spans(messages, range(len(pieces)), pieces.__getitem__)
    assert all(0 <= span.first < span.end <= len(pieces) for span in found)
    return [b"".join(pieces[span.first : span.end]).decode(errors="replace") for span in found]


def test_what_stands_before_the_first_turn_is_instructions() -> None:
    assert spans("<s>Be kind.</s><u>Hi</u>", ("system", "Be kind."), ("user", "Hi")) == [
        "<s>Be kind.</s><u>"
    ]
    assert spans("<s>You help.</s><u>Hi</u>", ("user", "Hi")) == ["<s>You help.</s><u>"]
    assert spans("Hi", ("user", "Hi")) == []


def test_later_instructions_are_what_they_say() -> None:
    text = "<s>A b.</s><u>Hi</u><a>Yo</a><s>Now in rhyme.</s><u>A b.</u>"
    said: tuple[tuple[Role, str], ...] = (
        *(("system", "A b."), ("user", "Hi"), ("assistant", "Yo")),
        *(("system", " Now in rhyme.\n"), ("user", "A b.")),
    )
    assert spans(text, *said) == ["<s>A b.</s><u>", "Now in rhyme."]


def test_instructions_alone_are_what_they_say() -> None:
    assert spans("<s>A b.</s><s>C d.</s>", ("system", "A b."), ("system", "C d.")) == ["A b.", "C d."]


@pytest.mark.parametrize("content", ["changed by the template", "", "  "])
def test_a_turn_that_is_not_found_does_not_become_instructions(content: str) -> None:
    text = "<s>Be kind.</s><u>CHANGED</u><a>Yo</a>"
    told = spans(text, ("system", "Be kind."), ("user", content), ("assistant", "Yo"))
    assert told == ["Be kind."]


@given(
    st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), st.text(max_size=9)), max_size=6),
    st.integers(1, 7),
)
def test_tokens_that_have_a_byte_of_instructions_are_theirs(
    said: list[tuple[Role, str]], width: int
) -> None:
    text = "".join(f"<{role}>{content.strip()}</{role}>" for role, content in said)
    told = spans(text, *said, width=width)
    leading = next((number for number, (role, _) in enumerate(said) if role != "system"), len(said))
    whole = [content.strip() for role, content in said[:leading] if content.strip()]
    if told and width == 1:
        assert all(content in "".join(told) for content in whole)
    assert bool(told) or not whole


def test_spans_have_no_token_in_common_and_are_in_order() -> None:
    raw = b"<s>One.</s><u>x</u><s>Two.</s><s>Three.</s>"
    messages = [
        *(ChatMessage("system", "One."), ChatMessage("user", "x")),
        *(ChatMessage("system", "Two."), ChatMessage("system", "Three.")),
    ]
    found = instruction_spans(messages, raw, lambda byte: bytes([byte]))
    assert [raw[each.first : each.end] for each in found] == [b"<s>One.</s><u>", b"Two.", b"Three."]
    assert found[1] == Span(raw.index(b"Two."), raw.index(b"Two.") + 4)
