"""A SentencePiece model, ``tokenizer.model``, as a tokenizer: Llama 2 and Mistral came with no other.

``transformers`` makes it one that splits as SentencePiece does (``build_tokenizer_from_spm_proto``), for
which the package sentencepiece is not needed; the rest is what LlamaTokenizer says of itself: a beginning,
unless ``add_bos_token`` denies it, and a space in front of what follows a control token, unless ``legacy``
does.
"""

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from pyramidserve.errors import CheckpointError

TOKENIZER, MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Of a checkpoint, what else says how its tokenizer works.
BESIDE = (SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# What a SentencePiece model is, and a piece of it that is never text.
UNIGRAM, BPE, CONTROL = 1, 2, 3


def has_model_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint's tokenizer is a SentencePiece model, and nothing else."""
    return (checkpoint / MODEL).is_file() and not (checkpoint / TOKENIZER).is_file()


def tokenizer_of_model(checkpoint: Path) -> Any:
    """The ``transformers`` tokenizer of a checkpoint's tokenizer.model, with the settings beside it.

    Raises CheckpointError where that is not a SentencePiece model.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter

    model, told = _read(checkpoint / MODEL), checkpoint / SETTINGS
    settings: dict[str, Any] = json.loads(told.read_text()) if told.is_file() else {}
    if settings.get("add_prefix_space") is False:
        model.normalizer_spec.add_dummy_prefix = False
    vocabulary: Any = {piece.piece: number for number, piece in enumerate(model.pieces)}
    if model.trainer_spec.model_type == UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(  # type: ignore[no-untyped-call]
        proto=model, vocab=vocabulary, legacy=settings.get("legacy") is not False
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in model.pieces if piece.type == CONTROL]
    )
    spec = model.trainer_spec
    own = {
        "add_bos_token": True,
        "bos_token": spec.bos_piece if spec.bos_id >= 0 else None,
        "eos_token": spec.eos_piece if spec.eos_id >= 0 else None,
        "unk_token": spec.unk_piece,
    }
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as made:
        for name in BESIDE:
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, made)
        tokenizer.save(str(Path(made) / TOKENIZER))
        lacking = {name: value for name, value in own.items() if name not in settings}
        return PreTrainedTokenizerFast.from_pretrained(made, **lacking)


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError

    messages: Any
    try:
        messages = import_module("transformers.utils.sentencepiece_model_pb2_new")
    except TypeError:  # the package sentencepiece is loaded, whose messages have the same names
        messages = import_module("sentencepiece.sentencepiece_model_pb2")
    way_out = f"put the checkpoint's {TOKENIZER} beside it"
    try:
        model = messages.ModelProto.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a SentencePiece model: {error}; {way_out}"
        ) from error
    if not model.pieces or model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(f"{file} is no SentencePiece model of pairs (BPE) or unigrams; {way_out}")
    return model
