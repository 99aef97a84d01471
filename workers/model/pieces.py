"""The bytes that single token ids stand for."""

import json
import re
from functools import lru_cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """Of a tokenizer of the tokenizers library."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
        self._is_byte_level = '"ByteLevel"' in decoder
        self._added = {token: str(each) for token, each in backend.get_added_tokens_decoder().items()}

    def __call__(self, token: int) -> bytes:
        """What ``token`` stands for, special tokens too; nothing for one that there is not."""
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            table = _byte_of()
            return bytes(table[each] for each in piece if each in table)
        if found := BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level BPE (Radford et al. 2019, GPT-2's code)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [each for each in range(256) if each not in shown]
    pairs = [(each, each) for each in shown]
    pairs += [(256 + number, each) for number, each in enumerate(hidden)]
    return {chr(character): byte for character, byte in pairs}
