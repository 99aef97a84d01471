"""A checkpoint whose tokenizer is tokenizer.model alone splits as SentencePiece does."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pyramidserve.chat import Chat
from pyramidserve.errors import CheckpointError
from pyramidserve.types import ChatMessage
from workers.model.tokenizer import Tokenizer

# Bytes are 3 to 258; pieces follow, the best merges first.
PIECES = ("▁", "h", "e", "l", "o", "he", "▁he", "ll", "▁hell", "▁▁", "[INST]")
FIRST = 259
SPACE, _, _, _, OH, HE, SPACE_HE, _, SPACE_HELL, SPACES, INST = range(FIRST, FIRST + len(PIECES))


def write_model(folder: Path, settings: dict[str, Any] | None = None, split: int = 2) -> Path:
    messages: Any = import_module("transformers.utils.sentencepiece_model_pb2_new")
    model = messages.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = split, True
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.escape_whitespaces = True, True
    model.normalizer_spec.remove_extra_whitespaces = False
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    own = [(piece, 4 if piece == "[INST]" else 1) for piece in PIECES]
    for number, (piece, kind) in enumerate([*special, *((f"<0x{i:02X}>", 6) for i in range(256)), *own]):
        added = model.pieces.add()
        added.piece, added.score, added.type = piece, -float(number), kind
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


LLAMA = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("settings", [None, LLAMA, LLAMA | {"legacy": True}])
@pytest.mark.parametrize(
    ("text", "ids"),  # as SentencePieceProcessor 0.2.3 gives them, behind the beginning
    [
        ("hello", [SPACE_HELL, OH]),
        ("  hello", [SPACES, SPACE_HELL, OH]),
        ("hell\nhe", [SPACE_HELL, 3 + 10, HE]),
        ("é", [SPACE, 3 + 0xC3, 3 + 0xA9]),
        ("he[INST]he", [SPACE_HE, INST, HE]),
    ],
)
def test_it_splits_as_sentencepiece_does(
    text: str, ids: list[int], settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(write_model(tmp_path, settings))
    assert tokenizer.encode(text) == [1, *ids]
    assert tokenizer.end_id == 2
    assert tokenizer.decode([1, *ids]).strip() == text.strip()


def test_its_settings_are_obeyed(tmp_path: Path) -> None:
    chat = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    more = {"add_bos_token": False, "chat_template": chat}
    tokenizer = Tokenizer(write_model(tmp_path, LLAMA | more))
    assert tokenizer.encode("he") == [SPACE_HE]
    assert tokenizer.chat(Chat.of([ChatMessage("user", "he")])) == [1, SPACE, INST, HE]
    tokenizer = Tokenizer(write_model(tmp_path, LLAMA | {"legacy": False}))
    assert tokenizer.encode("he</s>he") == [1, SPACE_HE, 2, HE]
    assert Tokenizer(write_model(tmp_path, LLAMA)).encode("he</s>he") == [1, SPACE_HE, 2, SPACE_HE]


def test_what_is_no_such_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no SentencePiece model of pairs.*put .*tokenizer.json"):
        Tokenizer(write_model(tmp_path, split=3))
    for content in (b"IQ== 0\nIg== 1\n", b"\xff" * 9, b""):  # the first as tiktoken writes them
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"SentencePiece model.*put .*tokenizer.json"):
            Tokenizer(tmp_path)
