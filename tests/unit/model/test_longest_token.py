"""No text has fewer tokens than its length says that it must have."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from workers.model.longest_token import characters_per_token

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = {token: index for index, token in enumerate([*BYTES, "aa", "aaaa", "Ġa"])}
MERGES = [("a", "a"), ("aa", "aa"), ("Ġ", "a")]
FALLBACK = {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
SPACED = {"<unk>": 0, **FALLBACK, "▁": 300, "a": 301, "▁a": 302, "aa": 303}


def byte_level(**parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_LEVEL, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def spaced(byte_fallback: bool = True) -> Tokenizer:
    merges = [("▁", "a"), ("a", "a")]
    model = models.BPE(
        vocab=SPACED, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "composed": byte_level(normalizer=normalizers.NFC()),
    "SentencePiece": spaced(),
}


@pytest.mark.parametrize("name", BOUNDED)
@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text(alphabet="a \u1100\u1161\u11a8\u03b1\u0313\u0300\u0345"))
def test_no_text_has_fewer_tokens_than_its_length_says(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    bound = characters_per_token(tokenizer)
    assert bound is not None
    assert len(text) <= bound * len(tokenizer.encode(text).ids)


def test_where_text_is_dropped_or_fused_there_is_no_bound() -> None:
    marked = byte_level()
    marked.add_special_tokens([AddedToken("<mark>", rstrip=True)])
    removing = pre_tokenizers.Split(" ", "removed")
    for tokenizer in (
        marked,
        spaced(byte_fallback=False),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
        byte_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        byte_level(pre_tokenizer=pre_tokenizers.Sequence([removing, pre_tokenizers.ByteLevel()])),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)),
        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    ):
        assert characters_per_token(tokenizer) is None
