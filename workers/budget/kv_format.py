"""In how many bytes a token's key and value are stored. Pure."""

from dataclasses import dataclass

from workers.budget.pages import PAGE_TOKENS


@dataclass(frozen=True)
class KVFormat:
    """How the numbers of keys and values are stored.

    Attributes:
        name: "float32", "bfloat16" or "float16", of their type; "int8" or "int4", of codes that a scale
            behind them turns into numbers.
        bits: of a number.
        scale_bytes: of the scale that each head's key has, and each head's value; 0: none.
    """

    name: str
    bits: int
    scale_bytes: int = 0

    def head_bytes(self, head_size: int) -> int:
        """Bytes of a key, or of a value, of one head."""
        return -(-head_size * self.bits // 8) + self.scale_bytes

    def row_bytes(self, kv_heads: int, head_size: int) -> int:
        """Bytes of one token in one layer."""
        return 2 * kv_heads * self.head_bytes(head_size)

    def page_bytes(self, kv_heads: int, head_size: int) -> int:
        """Bytes of a page."""
        return PAGE_TOKENS * self.row_bytes(kv_heads, head_size)

    def share(self, head_size: int) -> float:
        """Bytes of a token beside those of numbers in 16 bits."""
        return self.head_bytes(head_size) / (2 * head_size)


_ALL = (
    KVFormat("float32", 32),
    KVFormat("bfloat16", 16),
    KVFormat("float16", 16),
    KVFormat("int8", 8, scale_bytes=2),
    KVFormat("int4", 4, scale_bytes=2),
)
KV_FORMATS = {each.name: each for each in _ALL}
# What a deployment may ask for; "auto" is the type of weights and activations.
KV_DTYPES = ("auto", *KV_FORMATS)
