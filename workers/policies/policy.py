"""What a compression policy is: its counts, its knobs and what it is called. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Parameter
from workers.budget.plan import KeepPlan
from workers.policies.budget import shared_out
from workers.policies.observed import Observed, ends

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        prompt_tokens: 1 or more.
        layers: of the model.
        kv_keep: fraction of the prompt's KV, summed over layers, in (0, 1]; None where the knobs say it.
        prunes: what is not chosen goes no deeper, where the policy has prefill "prune".
        tokens: how many tokens each layer is to keep, where that was asked for; None elsewhere.
        weights: of each layer, by which they share what a fraction comes to; None: evenly.
    """

    prompt_tokens: int
    layers: int
    kv_keep: float | None = None
    prunes: bool = False
    tokens: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    @property
    def wanted(self) -> tuple[int, ...] | None:
        """Tokens of the prompt that each layer is to keep; None where the knobs say it.

        A fraction comes to whole tokens as its authors' code counts them, and to one at least.
        """
        if self.tokens is not None:
            return tuple(min(count, self.prompt_tokens) for count in self.tokens)
        if self.kv_keep is not None:
            mean = max(1, int(self.prompt_tokens * self.kv_keep))
            if self.weights is not None:
                return shared_out(mean * self.layers, self.weights, self.prompt_tokens)
            return (mean,) * self.layers
        return None


@dataclass(frozen=True)
class Policy:
    """A method of choosing what stays on the device.

    Attributes:
        name: what requests call it.
        version: changes whenever its choice does; router and shards must have the same.
        summary: what it keeps, in a line, with its source.
        knobs: a frozen dataclass whose fields are made by ``knob``, with its author's names.
        plan: how many tokens each layer keeps of a prompt and behind it, and what the choice of them looks
            at: a function of lengths alone.
        choose: which they are, of so many tokens so many: indices, int64 [..., sets, kept], ascending.
        prefills: ways to prefill that a request may choose of, the usual one first; empty: no choice.
        keeps_all: nothing is ever evicted.
        calibrates: layers share a fraction that is asked for as it was measured of the model, if it was,
            unless a request says otherwise or prunes.
        gated: it chooses by gates, which must have been trained of the model; see ``gates.py``.
    """

    name: str
    version: str
    summary: str
    knobs: type[Any]
    plan: Callable[[Target, Any], KeepPlan]
    choose: "Callable[[Observed, int, int, Any], torch.Tensor]" = ends
    prefills: tuple[str, ...] = ()
    keeps_all: bool = False
    calibrates: bool = False
    gated: bool = False


def knob(default: Parameter, allowed: str, meaning: str, counts: bool = False) -> Any:
    """A field of a policy's knobs.

    Args:
        allowed: an interval, such as "[0, 1)", "(0, 1]" or "[1, ...)", or texts, such as "cosine|linear".
        counts: it says how many tokens stay, so that a fraction or a count that is asked for replaces it.
    """
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning, "counts": counts})


def heads_knob(default: str) -> Any:
    """The knob of every policy that scores: whose tokens stay. ``default`` is its authors'."""
    return knob(default, "each|all", "each KV head keeps tokens of its own, or all keep the same")


def drop_knob() -> Any:
    """The knob of every policy that holds a count; their authors drop tokens one by one."""
    return knob(16, "[1, ...)", "tokens that go at once while others are generated")


def read_knobs(policy: Policy, parameters: Mapping[str, Parameter]) -> Any:
    """The policy's knobs, those that are not given at their defaults.

    Raises InvalidRequestError, naming knob and value, and what is allowed.
    """
    known = {each.name: each for each in fields(policy.knobs)}
    for name in parameters:
        if name not in known:
            meant = get_close_matches(name, known, 1)
            hint = f"; {meant[0]!r} is" if meant else f"; it has {', '.join(known) or 'none'}"
            raise InvalidRequestError(f"{name!r} is no knob of policy {policy.name!r}{hint}")
    return policy.knobs(**{name: _checked(known[name], value) for name, value in parameters.items()})


def counting_knobs(policy: Policy) -> set[str]:
    """Those that a fraction or counts take the place of."""
    return {each.name for each in fields(policy.knobs) if each.metadata["counts"]}


def describe(policy: Policy) -> list[tuple[str, Parameter, str, str]]:
    """Of each knob its name, its default, what is allowed, and what it means."""
    described = []
    for each in fields(policy.knobs):
        assert each.default is not MISSING
        described.append((each.name, each.default, each.metadata["allowed"], each.metadata["meaning"]))
    return described


def _checked(known: Field[Any], value: Parameter) -> Parameter:
    allowed: str = known.metadata["allowed"]
    if isinstance(known.default, str):
        if value not in allowed.split("|"):
            raise InvalidRequestError(f"{known.name} is {value!r}; it must be {_texts(allowed)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{known.name} is {value!r}; it must be a number in {allowed}")
    whole = isinstance(known.default, int)
    if not _within(value, allowed) or (whole and value != int(value)):
        kind = "a whole number " if whole else ""
        raise InvalidRequestError(f"{known.name} is {value}; it must be {kind}in {allowed}")
    return int(value) if whole else float(value)


def _texts(allowed: str) -> str:
    return " or ".join(repr(text) for text in allowed.split("|"))


def _within(value: float, interval: str) -> bool:
    low, high = (part.strip() for part in interval[1:-1].split(","))
    above = value >= float(low) if interval[0] == "[" else value > float(low)
    if high == "...":
        return above and value < float("inf")
    return above and (value <= float(high) if interval[-1] == "]" else value < float(high))
