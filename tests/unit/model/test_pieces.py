"""What single ids stand for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from workers.model.pieces import Pieces


def byte_level() -> Tokenizer:
    """Every byte, as GPT-2 writes it, and some longer pieces."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "Ġt", "Ġth"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("Ġt", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


@given(st.text(max_size=20))
def test_pieces_of_bytes_make_up_the_text(text: str) -> None:
    made = byte_level()
    pieces = Pieces(made)
    assert b"".join(map(pieces, made.encode(text + "<|end|>").ids)) == f"{text}<|end|>".encode()


def test_pieces_of_sentencepiece_have_blanks_and_bytes() -> None:
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "▁a": 2, "b": 3}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert [Pieces(made)(number) for number in range(5)] == [b"<unk>", b"\xe2", b" a", b"b", b""]


@pytest.mark.parametrize("text", ["Hello there", "naïve café ☕ 日本", "\ttabs\n\nlines  "])
def test_pieces_of_the_embedded_model_make_up_the_text(text: str, embedded: Path) -> None:
    made = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    assert b"".join(map(Pieces(made), made.encode(text, add_special_tokens=False).ids)) == text.encode()
