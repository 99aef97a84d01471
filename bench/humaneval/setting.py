"""The compressions that are compared."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A request's compression, and the turns of a session that a problem is answered in.

    Of two turns the first has the problem, and one token of its answer; the second goes on behind that.
    """

    compression: Mapping[str, str | float]
    turns: int = 1


PRUNE: dict[str, str | float] = {"policy": "pyramid", "prefill": "prune", "kv_keep": 0.45}
EVICT: dict[str, str | float] = {"policy": "pyramid", "prefill": "evict", "kv_keep": 0.45}
BASELINE = "full"
SETTINGS = {
    BASELINE: Setting({"policy": "full"}),
    "prune": Setting(PRUNE),
    "evict": Setting(EVICT),
    # What `turn` brings back it brings back when a later turn begins.
    "evict-turn": Setting({**EVICT, "recall": "turn"}, turns=2),
    "evict-exact": Setting({**EVICT, "recall": "exact"}),
}
