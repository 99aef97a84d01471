"""The measures of recall: real text in pieces, and facts all over it."""

from pydoc_data.topics import topics

import pytest

from workers.bench import texts
from workers.bench.facts import FACTS, LATER_TURNS, talks
from workers.bench.texts import windows


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        first = len(self.words)
        self.words += text.split(" ")
        return list(range(first, len(self.words)))

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[token] for token in ids)


def test_pieces_are_of_one_length_and_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "topics", {"a": "x " * 9, "b": "y " * 4, "c": "z " * 12})
    monkeypatch.setattr(texts, "PACKAGES", ())
    pieces = windows(Words(), 10, 9)  # type: ignore[arg-type]
    assert [len(piece) for piece in pieces] == [10, 10]
    assert sorted(token for piece in pieces for token in piece) == list(range(20))


def test_a_document_has_all_its_facts_and_later_turns_ask_for_some() -> None:
    made = talks(Words(), 300, 3, seed=2)  # type: ignore[arg-type]
    assert made == talks(Words(), 300, 3, seed=2)  # type: ignore[arg-type]
    for talk in made:
        assert talk.document.count(" keeps the ") == FACTS
        assert len(set(talk.asked)) == LATER_TURNS
        for fact in talk.asked:
            assert fact.sentence in talk.document
            assert "".join(fact.answer) + "." == fact.sentence.strip()


def test_behind_the_reference_come_docstrings_and_never_code() -> None:
    short, many = windows(Words(), 2000, 3), windows(Words(), 2000, 99999)  # type: ignore[arg-type]
    assert [len(piece) for piece in short] == [2000] * 3
    assert sum(map(len, many)) > len(" ".join(topics.values()).split(" "))
    source = b'"""Of the module."""\nx = "code"\n\n\ndef f():\n    """Of f."""\n'
    assert texts.docstrings(source) == "Of the module.\n\nOf f."
