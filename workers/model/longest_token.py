"""How much text one id can stand for, by a tokenizer's own description."""

import json
from collections.abc import Mapping
from typing import Any

# What a normalizer makes of so many characters at most, it may make one: composed ones decompose to four.
_NORMALIZERS = {"Prepend": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"}


def characters_per_token(backend: Any) -> int | None:
    """Characters of a text that one id stands for, at most; None where there is no such bound.

    ``backend``: of the tokenizers library. There is none where something of a text may be dropped, or any
    number of unknown characters become one id.
    """
    model = backend.model
    fuses = getattr(model, "fuse_unk", True) and getattr(model, "unk_token", "?") is not None
    if fuses and not getattr(model, "byte_fallback", False):
        return None
    if any(each.lstrip or each.rstrip for each in backend.get_added_tokens_decoder().values()):
        return None
    shrinks = _shrinks(_state(backend.normalizer))
    if shrinks is None or not _keeps_all(_state(backend.pre_tokenizer)):
        return None
    # Characters of a byte-level vocabulary are bytes, of which a character of a text has one at least.
    longest: int = max(map(len, backend.get_vocab(with_added_tokens=True)))
    return shrinks * longest


def _state(part: Any) -> Mapping[str, Any] | None:
    """What a part of a tokenizer says of itself."""
    state: Mapping[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return state


def _shrinks(normalizer: Mapping[str, Any] | None) -> int | None:
    """How many characters may become one; None where any number may."""
    match normalizer:
        case None:
            return 1
        case {"type": "Sequence", "normalizers": parts}:
            product = 1
            for part in map(_shrinks, parts):
                if part is None:
                    return None
                product *= part
            return product
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return 1 if 0 < len(pattern) <= len(content) else None
        case {"type": name}:
            return _NORMALIZERS.get(name)
    return None


def _keeps_all(splitter: Mapping[str, Any] | None) -> bool:
    match splitter:
        case None:
            return True
        case {"type": "Sequence", "pretokenizers": parts}:
            return all(map(_keeps_all, parts))
        case {"type": name, "behavior": behavior}:
            return name in _PRE_TOKENIZERS and behavior != "Removed"
        case {"type": name}:
            return name in _PRE_TOKENIZERS
    return False
