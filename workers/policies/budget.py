"""How layers share a prompt's budget: evenly, as a pyramid, or as it was measured of a model. Pure."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyramidserve.errors import ConfigurationError
from pyramidserve.types import Compression, Parameter

UNIFORM, PYRAMID, CALIBRATED = BUDGETS = ("uniform", "pyramid", "calibrated")
# A straight pyramid keeps this many times its mean in its first layer, and as much less in its last.
SLOPE = 0.5
# What `pyramidserve calibrate` has measured of models, each a file.
MEASURED = Path(__file__).with_name("calibrated")


def pyramid_weights(layers: int) -> tuple[float, ...]:
    """Of each layer, along a straight line from 1.5 to 0.5 times the mean (PyramidKV, arXiv 2406.02069)."""
    return tuple(1 + SLOPE * (1 - 2 * layer / max(1, layers - 1)) for layer in range(layers))


def shared_out(tokens: int, weights: Sequence[float], most: int) -> tuple[int, ...]:
    """``tokens`` over layers as near to ``weights`` as it goes, to none less than 1 or more than ``most``.

    Args:
        tokens: from as many as there are layers to ``most`` for each.
    """
    low, high = 0.0, 2 * most / min(weights)
    for _ in range(64):  # the water level at which all is shared out
        level = (low + high) / 2
        filled = sum(min(max(level * weight, 1), most) for weight in weights)
        low, high = (level, high) if filled < tokens else (low, level)
    parts = [min(max(high * weight, 1), most) for weight in weights]
    counts = [math.floor(part) for part in parts]
    # What is cut off goes to those that it was the most of.
    missing = tokens - sum(counts)
    for layer in sorted(range(len(parts)), key=lambda layer: counts[layer] - parts[layer])[:missing]:
        counts[layer] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Trial:
    """What a policy has left of what a prompt wins, where it keeps a share of the tokens.

    Attributes:
        kept: the share.
        policy, prefill, parameters: as requests have them.
        text: of what the prompt wins on the text that goes on behind it, the part that is left.
        facts: of what a document wins on answers to later questions; None where it wins nothing.
    """

    kept: float
    policy: str
    prefill: str
    parameters: tuple[tuple[str, Parameter], ...]
    text: float
    facts: float | None

    @property
    def score(self) -> float:
        """The mean of both: they are parts of what prompts win, so that neither needs a weight."""
        return self.text if self.facts is None else (self.text + self.facts) / 2


@dataclass(frozen=True)
class Calibration:
    """What each layer of a model is to keep, and what policies have left, as it was measured.

    Attributes:
        model: fingerprint of those that it is of; see ``ModelConfig.fingerprint``.
        kept: shares of a prompt's KV, ascending, below 1.
        weights: of each of them, of each layer; their mean is 1.
        trials: of policies with these weights; none: nobody has measured them.
    """

    model: str
    kept: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    trials: tuple[Trial, ...] = ()

    def at(self, kv_keep: float) -> tuple[float, ...]:
        """Weights of layers where ``kv_keep`` is kept: between two that were measured, in a line."""
        known = [*zip(self.kept, self.weights, strict=True), (1.0, (1.0,) * len(self.weights[0]))]
        for (low, few), (high, many) in pairwise(known):
            if kv_keep < high:
                part = max(0.0, (kv_keep - low) / (high - low))
                return tuple(round(a + part * (b - a), 4) for a, b in zip(few, many, strict=True))
        return known[-1][1]

    def write(self, file: Path) -> None:
        """Writes what ``read_calibration`` reads."""
        told = asdict(self)
        trials = [
            json.dumps(each | {"parameters": dict(each["parameters"])}) for each in told.pop("trials")
        ]
        lines = ",\n  ".join(trials)
        file.write_text(
            f'{json.dumps(told)[:-1]}, "trials": [\n  {lines}]}}\n' if trials else json.dumps(told) + "\n"
        )


def read_calibration(file: Path) -> Calibration:
    """Raises ConfigurationError where ``file`` is not what ``pyramidserve calibrate`` writes."""
    try:
        told = json.loads(file.read_text())
        read = Calibration(
            *(told["model"], tuple(told["kept"]), tuple(map(tuple, told["weights"]))),
            trials=tuple(map(_trial, told.get("trials", ()))),
        )
        layers = {len(weights) for weights in read.weights}
        if len(layers) != 1 or len(read.weights) != len(read.kept) or list(read.kept) != sorted(read.kept):
            raise ValueError("shares and weights do not match")
        if not all(weight > 0 for weights in read.weights for weight in weights):
            raise ValueError("a weight is not above 0")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"budgets {str(file)!r} cannot be read: {error!r}; `pyramidserve calibrate` writes such files"
        ) from error
    return read


def _trial(told: Mapping[str, Any]) -> Trial:
    """Raises ValueError, TypeError or KeyError where it is none."""
    parameters = tuple(dict(Compression(parameters=told["parameters"]).parameters).items())
    trial = Trial(**{**told, "parameters": parameters})
    if not 0 < trial.kept <= 1 or not math.isfinite(trial.score):
        raise ValueError(f"a trial keeps {trial.kept} and has {trial.score}")
    return trial


def best_shares(losses: Sequence[Mapping[float, float]], kept: float) -> tuple[float, ...]:
    """What each layer is to keep so that the sum of losses is the least, where the mean is ``kept``.

    Greedy on the lower convex hulls of the curves, where it is exact: whatever share wins most goes first.

    Args:
        losses: of each layer, by the share that it alone keeps; 1, at which nothing is lost, among them.
    """
    shares, steps = [], []
    for layer, curve in enumerate(losses):
        hull = _hull(sorted(curve.items()))
        shares.append(hull[0][0])
        for (low, worse), (high, better) in pairwise(hull):
            steps.append(((better - worse) / (high - low), layer, high - low))
    left = kept * len(losses) - sum(shares)
    for _, layer, width in sorted(steps):
        taken = min(width, max(left, 0.0))
        shares[layer] += taken
        left -= taken
    return tuple(shares)


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of ``points``, ascending, on the lower convex hull of what never grows."""
    hull: list[tuple[float, float]] = []
    least = math.inf
    for x, y in points:
        least = min(least, y)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, least)):
            hull.pop()
        hull.append((x, least))
    return hull


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
