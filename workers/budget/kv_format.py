"""In how many bytes a token's key and value are stored. Pure."""

from dataclasses import dataclass

from workers.budget.pages import PAGE_TOKENS

# Where a format is too coarse for the newest tokens, at which attention looks most closely, so many of them
# are attended to in a finer one. There is room for more, so that a step may feed several of a sequence.
RECENT_TOKENS, RECENT_ROOM = 32, 48
MOST_FED = RECENT_ROOM - RECENT_TOKENS


@dataclass(frozen=True)
class KVFormat:
    """How the numbers of keys and values are stored.

    Attributes:
        name: "float32", "bfloat16" or "float16", of their type; "int8" or "int4", of codes that a scale
            behind them turns into numbers.
        bits: of a number.
        scale_bytes: of the scale that each head's key has, and each head's value; 0: none.
        recent: the format of the newest tokens, which they have beside this one; "": none.
    """

    name: str
    bits: int
    scale_bytes: int = 0
    recent: str = ""

    def head_bytes(self, head_size: int) -> int:
        """Bytes of a key, or of a value, of one head."""
        return -(-head_size * self.bits // 8) + self.scale_bytes

    def head_size(self, head_bytes: int) -> int:
        """Numbers of a key that takes ``head_bytes``, as ``head_bytes`` says it; at least 1."""
        return max(1, (head_bytes - self.scale_bytes) * 8 // self.bits)

    def row_bytes(self, kv_heads: int, head_size: int) -> int:
        """Bytes of one token in one layer."""
        return 2 * kv_heads * self.head_bytes(head_size)

    def page_bytes(self, kv_heads: int, head_size: int) -> int:
        """Bytes of a page."""
        return PAGE_TOKENS * self.row_bytes(kv_heads, head_size)

    def share(self, head_size: int) -> float:
        """Bytes of a token beside those of numbers in 16 bits."""
        return self.head_bytes(head_size) / (2 * head_size)

    @property
    def recent_page_tokens(self) -> int:
        """Tokens that a page has room for in the format of the newest."""
        return PAGE_TOKENS * self.bits // KV_FORMATS[self.recent].bits

    @property
    def recent_pages(self) -> int:
        """Pages for the newest tokens of a layer."""
        return RECENT_ROOM // self.recent_page_tokens if self.recent else 0

    @property
    def index_bits(self) -> int:
        """Of a number of a key in an index: an eighth of its own, and 2 where those are few."""
        return max(2, self.bits // 8)

    @property
    def keys_per_row(self) -> int:
        """Keys that an index has in the room of a row, which is both key and value of a token."""
        return 2 * self.bits // self.index_bits

    @property
    def index_scale_rows(self) -> int:
        """Rows before them, with what scales them: two numbers, of 16 bits or more, a channel."""
        return -(-16 // self.bits)


_ALL = (
    KVFormat("float32", 32),
    KVFormat("bfloat16", 16),
    KVFormat("float16", 16),
    KVFormat("int8", 8, scale_bytes=2),
    KVFormat("int4", 4, scale_bytes=2, recent="int8"),
)
KV_FORMATS = {each.name: each for each in _ALL}
# What a deployment may ask for; "auto" is the type of weights and activations.
KV_DTYPES = ("auto", *KV_FORMATS)


def stored(kv_dtype: str, dtype: str) -> str:
    """Which of KV_FORMATS ``kv_dtype`` is beside weights of ``dtype``; of 16 bits where both are "auto"."""
    return next((each for each in (kv_dtype, dtype) if each != "auto"), "bfloat16")
