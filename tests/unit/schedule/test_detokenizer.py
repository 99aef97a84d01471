"""Text comes out as it becomes certain, whole, and up to the first stop string."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from fake_pipeline import Spoken, decode
from hypothesis import given
from hypothesis import strategies as st

from workers.schedule.detokenizer import UNFINISHED, Detokenizer

letters = st.text("aé漢😀 " + UNFINISHED, max_size=12)
stop_strings = st.lists(st.text("ab漢", min_size=1, max_size=4), max_size=3)


def split(data: st.DataObject, text: str) -> tuple[list[int], list[bytes]]:
    """Ids of ``text`` in tokens of up to five bytes, and the vocabulary they point to."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    pieces = [raw[a:b] for a, b in pairwise(cuts)]
    return list(range(len(pieces))), pieces


def detokenizer(pieces: list[bytes], *stop: str) -> Detokenizer:
    said = Spoken(lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"))
    return Detokenizer(said, stop=stop)


@given(st.data(), letters)
def test_the_parts_make_up_the_text_of_all_ids(data: st.DataObject, text: str) -> None:
    ids, pieces = split(data, text)
    stream = detokenizer(pieces)
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_reads_them(raw: bytes) -> None:
    stream = Detokenizer(Spoken())
    assert "".join([*map(stream.push, raw), stream.flush()]) == decode(list(raw))


@given(st.data(), st.text("ab漢", max_size=12), stop_strings)
def test_the_text_ends_before_the_first_stop_string_that_is_complete(
    data: st.DataObject, text: str, stops: list[str]
) -> None:
    ids, pieces = split(data, text)
    stream = detokenizer(pieces, *stops)
    expected, met = text, ""
    for end in range(len(ids)):
        # Stop strings are looked for where characters are complete.
        so_far = b"".join(pieces[: end + 1]).decode("utf-8", "ignore")
        whole = so_far.encode() == b"".join(pieces[: end + 1])
        found = [(so_far.find(stop), stop) for stop in stops if stop in so_far]
        if found and (whole or end == len(ids) - 1):
            at, met = min(found)
            expected = text[:at]
            break
    parts = [*map(stream.push, ids), stream.flush()]
    assert ("".join(parts), stream.stop_string) == (expected, met)


def test_a_character_is_held_back_until_its_last_byte() -> None:
    stream = Detokenizer(Spoken())
    assert [stream.push(byte) for byte in "😀a".encode()] == ["", "", "", "😀", "a"]


def test_a_possible_stop_string_is_held_back_until_it_is_decided() -> None:
    stream = Detokenizer(Spoken(), stop=["STOP"])
    assert [stream.push(byte) for byte in b"aSTxSTOPy"] == ["a", "", "", "STx", "", "", "", "", ""]
    assert (stream.stop_string, stream.flush()) == ("STOP", "")


def test_a_stop_string_that_repeats_itself_is_found() -> None:
    stream = Detokenizer(Spoken(), stop=["aab"])
    assert [stream.push(byte) for byte in b"aaaab"] == ["", "", "a", "a", ""]
    assert stream.stop_string == "aab"


def test_what_was_held_back_comes_with_the_flush() -> None:
    stream = Detokenizer(Spoken(), stop=["STOP"])
    assert [stream.push(byte) for byte in b"aSTO"] == ["a", "", "", ""]
    assert stream.flush() == "STO"
    cut = Detokenizer(Spoken())
    assert [cut.push(byte) for byte in "é".encode()[:1]] == [""]
    assert cut.flush() == UNFINISHED


@pytest.mark.parametrize(
    ("text", "stops", "expected", "met"),
    [
        ("one two three", ("three", "two"), "one ", "two"),
        ("aab", ("ab", "aab"), "", "aab"),
        ("abc", ("abc", "ab"), "", "ab"),
        ("none of them", ("END",), "none of them", ""),
        ("at the end END", ("END",), "at the end ", "END"),
    ],
)
def test_the_earliest_stop_string_of_a_token_wins(
    text: str, stops: tuple[str, ...], expected: str, met: str
) -> None:
    stream = detokenizer([text.encode()], *stops)
    assert (stream.push(0) + stream.flush(), stream.stop_string) == (expected, met)


def sentence(words: Sequence[str]) -> Callable[[Sequence[int]], str]:
    """Decodes as SentencePiece does: without the space in front of the first word."""
    return lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_spaces_that_a_tokenizer_drops_in_front_stay_between_words() -> None:
    words = ("▁one", "▁two", "▁three")
    stream = Detokenizer(Spoken(sentence(words)))
    assert [stream.push(index) for index in range(3)] == ["one", " two", " three"]


def test_behind_a_prompt_the_first_space_is_there() -> None:
    words = ("▁one", "▁two", "▁three")
    stream = Detokenizer(Spoken(sentence(words)), prompt_ids=[0])
    assert [stream.push(index) for index in (1, 2)] == [" two", " three"]


@pytest.mark.parametrize(
    ("ids", "stop", "text", "met"),
    [
        ([97, 300, 98], "<|end|>", "a", "<|end|>"),
        ([97, 10, 300, 98, 99], "<|end|>b", "a\n", "<|end|>b"),
        ([97, 10, 300, 99], "<|end|>b", "a\nc", ""),
        ([97, 300, 98, 99], "a<|end|>b", "", "a<|end|>b"),
        ([97, 300, 98, 99], "bc", "a", "bc"),
        ([97, 300, 98, 99], "abc", "abc", ""),
        ([0xC3, 300, 98], "<|end|>", UNFINISHED, "<|end|>"),
    ],
)
def test_stop_strings_are_found_in_what_special_tokens_say(
    ids: list[int], stop: str, text: str, met: str
) -> None:
    stream = Detokenizer(Spoken(special={300: "<|end|>"}), stop=[stop])
    assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert stream.stop_string == met
