"""What is compared: a way to hold a prompt's KV in so many bytes. Pure."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Parameter
from workers.budget.kv_format import KV_DTYPES
from workers.budget.kv_share import KVShare
from workers.budget.plan import INDEX_SHARE
from workers.policies import auto
from workers.policies.registry import POLICIES, keeps_all, policy_name, recall
from workers.policies.valid import validate

# Of the bytes that all KV takes in 16 bits.
SHARES = (0.45, 0.25, 0.12)
NAME = re.compile(
    r"(?P<policy>[\w-]+)(/(?P<prefill>\w+))?(\[(?P<knobs>[^]]*)\])?(:(?P<kv_dtype>\w+))?(\+(?P<recall>\w+))?"
    r"(@(?P<share>\d*\.?\d+))?"
)
AUTO = auto.POLICY.name
# With a look at the prompt's end, as it does best (docs/policies.md).
GATED = "kvzap[window_size=200]"
SHAPE = "POLICY/PREFILL[KNOB=VALUE,...]:FORMAT+RECALL@SHARE"


@dataclass(frozen=True)
class Cell:
    """A way to hold KV.

    Attributes:
        compression: all but how much stays.
        kv_dtype: in what keys and values are stored, one of KV_DTYPES.
        share: bytes that stay, of those that all KV takes in 16 bits; None where every token stays.
    """

    compression: Compression
    kv_dtype: str = "auto"
    share: float | None = None

    @property
    def method(self) -> str:
        """All but the share, as in ``pyramid/evict:int8+turn``."""
        known = dict(self.compression.parameters)
        knobs = ",".join(f"{name}={_written(value)}" for name, value in known.items())
        mode = recall(self.compression)
        return "".join(
            (
                policy_name(self.compression),
                f"[{knobs}]" if knobs else "",
                "" if self.kv_dtype == "auto" else f":{self.kv_dtype}",
                "" if mode == "off" else f"+{mode}",
            )
        )

    @property
    def name(self) -> str:
        """As in ``pyramid/evict:int8+turn@0.25``."""
        return self.method if self.share is None else f"{self.method}@{self.share:g}"


@dataclass(frozen=True)
class Holding:
    """A cell with what its format comes to for a model."""

    cell: Cell
    shares: KVShare

    def asks(self, prompt_tokens: int) -> Compression:
        """What the request of a prompt asks for: as many of its tokens as there are bytes for.

        Raises InvalidRequestError where more would stay than there is, unless it is "auto", which may.
        """
        cell = self.cell
        if cell.share is None:
            return cell.compression
        if cell.share > self.shares.token and cell.compression.policy != AUTO:
            raise InvalidRequestError(
                f"{cell.name}: all tokens take {self.shares.token:.3g} of the bytes in that format; give "
                "less than that, or a policy that keeps all"
            )
        keep = self.shares.kv_keep(cell.share, prompt_tokens, self._indexes)
        compression = replace(cell.compression, kv_keep=keep)
        validate(compression)
        return compression

    def fixed(self, prompt_tokens: int) -> float:
        """Bytes that are taken in any case, of those of the prompt in 16 bits.

        And what an index takes beyond INDEX_SHARE of its tokens, which counts as kept.
        """
        shares, fixed = self.shares, self.shares.fixed_tokens / prompt_tokens
        if self.cell.share is None or not self._indexes:
            return fixed
        gone = (1 - shares.kv_keep(self.cell.share, prompt_tokens, indexes=True)) / (1 - INDEX_SHARE)
        return fixed + gone * (shares.index - INDEX_SHARE * shares.token)

    @property
    def _indexes(self) -> bool:
        return recall(self.cell.compression) == "step"


# What the others are compared with: everything is kept.
BASELINE = Cell(Compression())


def read_cell(name: str) -> Cell:
    """The cell of a name. Raises InvalidRequestError where it is none."""
    read = NAME.fullmatch(name)
    if not read:
        raise InvalidRequestError(f"--cells names {name!r}; it must be {SHAPE}, as in snapkv:int8@0.25")
    kv_dtype, share = read["kv_dtype"] or "auto", read["share"]
    knobs = dict(_knob(name, each) for each in (read["knobs"] or "").split(",") if each)
    compression = Compression(
        read["policy"], read["prefill"] or "", recall=read["recall"] or "off", parameters=knobs
    )
    chooses = compression.policy in POLICIES and not keeps_all(compression)
    validate(replace(compression, kv_keep=min(1.0, float(share))) if share and chooses else compression)
    if kv_dtype not in KV_DTYPES:
        raise InvalidRequestError(
            f"--cells names {name!r}; its format must be one of {', '.join(KV_DTYPES)}"
        )
    if keeps_all(compression) != (share is None):
        way = (
            "keeps all: leave its share out" if share else "does not keep all: give it a share, as in @0.25"
        )
        raise InvalidRequestError(f"--cells names {name!r}; {compression.policy!r} {way}")
    return Cell(compression, kv_dtype, None if share is None else float(share))


def usual(others: Sequence[str] = ()) -> list[Cell]:
    """Those that are compared where none are named: ours, and ``others`` that are enabled, in 16 bits."""
    ours, few = ("snapkv", "expected_attention", "pyramid/evict", "defensive"), ("defensive", GATED)
    names = [
        *("full", "full:int8", "full:int4", "streaming@0.45", "pyramid/prune@0.45"),
        *(f"{name}@{share}" for name in ours for share in SHARES[:2]),
        *(f"{name}@{share}" for name in (GATED, *others) for share in SHARES),
        *("defensive:int8@0.45", f"{GATED}:int8@0.45", f"{GATED}:int8@0.25"),
        # All tokens take 0.27 in four bits.
        *(f"{name}:int4@{share}" for name in few for share in SHARES[1:]),
        *(f"{GATED}:int8+turn@0.45", f"{GATED}:int4+turn@0.25", f"{GATED}:int4+turn@0.12"),
        "auto:int8@0.25",
    ]
    return [read_cell(name) for name in names]


def with_baseline(cells: Iterable[Cell]) -> list[Cell]:
    """Each once, the baseline first: the others are compared with it as they are measured."""
    return list(dict.fromkeys((BASELINE, *cells)))


def _knob(cell: str, text: str) -> tuple[str, Parameter]:
    name, _, value = text.partition("=")
    if not value:
        raise InvalidRequestError(f"--cells names {cell!r}; {text!r} must be KNOB=VALUE")
    try:
        known: Parameter = json.loads(value)
    except json.JSONDecodeError:
        known = value  # a word
    return name, known


def _written(value: Parameter) -> str:
    return value if isinstance(value, str) else json.dumps(value)
