"""What was found of a cell, in numbers beside the baseline's, each with its 95 % interval. Pure."""

from collections.abc import Mapping
from typing import Any

from workers.bench.intervals import Interval, Pair, helped, mean_share, share

Found = Mapping[str, Any]


def summary(parts: Found, full: Found, token_share: float) -> dict[str, float]:
    """The numbers of a cell by the names of their columns; of parts that the baseline has too.

    Each part's ``bytes`` are those that stay of its bytes in 16 bits, where a token takes ``token_share``;
    and what is taken in any case.
    """
    told: dict[str, float] = {}
    for part in (name for name in parts if name in full):
        own, other = parts[part], full[part]
        if part in ("loss", "humaneval"):
            for name in own:
                told |= _passages(name, own[name], other[name], token_share)
        elif part == "tasks":
            for way in own:
                told |= _tasks(way, own[way], other[way], token_share)
        elif part == "facts":
            told |= {"kept_facts": own["kept"], "bytes_facts": _bytes(own, token_share)}
            if pairs := helped(zip(own["gains"], other["gains"], strict=True)):
                told |= _columns("facts_kept", share(pairs), "facts_low", "facts_high")
        elif part == "instructions":
            told |= {"kept_instructions": own["kept"], "bytes_instructions": _bytes(own, token_share)}
            for name, gains in (("instructions", "gains"), ("asked", "asked")):
                if pairs := helped(zip(own[gains], other[gains], strict=True)):
                    told |= _columns(name, share(pairs))
        else:
            told |= {f"{name}_{what}": value for name, each in own.items() for what, value in each.items()}
    return told


def _passages(name: str, own: Found, full: Found, token_share: float) -> dict[str, float]:
    """Loss in nats a token, how much worse that is, also of the worst text, and agreement with full."""
    ratios = [a / b for a, b in zip(own["nats"], full["nats"], strict=True)]
    worse = share(list(zip(own["nats"], full["nats"], strict=True)))
    tokens = own["tokens"]
    agree = share([(a * n, n) for a, n in zip(own.get("agree", [1.0] * len(tokens)), tokens, strict=True)])
    return {
        f"kept_{name}": own["kept"],
        f"bytes_{name}": _bytes(own, token_share),
        f"loss_{name}": sum(own["nats"]) / sum(tokens),
        **_columns(f"worse_{name}", Interval(*(each - 1 for each in worse))),
        f"worst_{name}": max(ratios) - 1,
        **_columns(f"agree_{name}", agree),
    }


def _tasks(way: str, own: Found, full: Found, token_share: float) -> dict[str, float]:
    """Shares of the gain that are kept: the mean over kinds of tasks, and of each kind."""
    kinds: dict[str, list[Pair]] = {}
    for name, gain in full["gains"].items():
        kinds.setdefault(name.split()[0], []).append((own["gains"][name], gain))
    counted = {kind: pairs for kind, each in kinds.items() if (pairs := helped(each))}
    told = {f"kept_{way}": own["kept"], f"bytes_{way}": _bytes(own, token_share)}
    if counted:
        told |= _columns(way, mean_share(counted.values()))
    for kind, pairs in counted.items():
        told |= _columns(f"{way}_{kind}", share(pairs))
    return told


def _bytes(own: Found, token_share: float) -> float:
    kept: float = own["kept"]
    return kept * token_share + float(own.get("fixed", 0))


def _columns(name: str, found: Interval, low: str = "", high: str = "") -> dict[str, float]:
    return {name: found.value, low or f"{name}_low": found.low, high or f"{name}_high": found.high}
