"""What a policy looks at before it chooses: a closed vocabulary, which every backend offers. Pure."""

from dataclasses import dataclass
from typing import Literal

# Over the KV heads of a layer: one choice for each, or one for all by the mean or the greatest of theirs.
Heads = Literal["each", "mean", "max"]
# What rows come to: the sum of what they pay; the most that one pays, by its most attentive query head; or
# how many of them pay less than the even share, 1 / the tokens that they see.
Rows = Literal["sum", "max", "low"]


@dataclass(frozen=True)
class RowAttention:
    """The attention that tokens get from rows, the mean of a KV head's query heads but for "max".

    Attributes:
        rows: of a prompt the newest so many look, and of generated tokens those just before a choice;
            None: all do, and what tokens that stay have got is not forgotten.
        newest: weight of the newest row; the oldest weighs 1, and between them weights are on a line.
        decay: each row multiplies with it what those before it have paid, in (0, 1].
        over_rows: what they come to; "max" of a prompt's alone.
    """

    rows: int | None
    newest: float = 1.0
    decay: float = 1.0
    over_rows: Rows = "sum"


@dataclass(frozen=True)
class KeysValues:
    """Keys, rotated by their positions, and values."""


@dataclass(frozen=True)
class QueryMoments:
    """Keys and values, and the moments of the queries of a prompt's rows, as they were before rotation.

    Attributes:
        first: position of the first row that counts.
    """

    first: int = 0


Observation = RowAttention | KeysValues | QueryMoments
