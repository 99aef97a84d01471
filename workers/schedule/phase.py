"""Where in its life a sequence is. Pure."""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Phase(Enum):
    """What a sequence waits for, or what the step does that carries it."""

    # It waits for its prefill: its first, or the one that computes the KV anew that it has given up.
    WAITING = "waiting"
    # A prefill carries it.
    PREFILLING = "prefilling"
    # It has output, and waits until others of its cohort have some too.
    RESTING = "resting"
    # It waits for its next decode or verification.
    READY = "ready"
    # A decode or a verification carries it.
    DECODING = "decoding"
    # Its KV is on its way to the host, to make room for others.
    SUSPENDING = "suspending"
    # Its KV waits on the host until there is room.
    SUSPENDED = "suspended"
    # Its KV is on its way back to the device.
    RESUMING = "resuming"
    # Its KV is being given up to make room for others; it is to begin anew.
    RESTARTING = "restarting"
    # It gets no more output, and waits to be released or parked.
    ENDED = "ended"
    # Its KV is being freed for good.
    RELEASING = "releasing"
    # Its KV becomes its session's, and waits for the next turn.
    PARKING = "parking"
    # The scheduler has forgotten it.
    GONE = "gone"


# The phases that may follow each.
MOVES: Mapping[Phase, frozenset[Phase]] = MappingProxyType(
    {
        Phase.WAITING: frozenset({Phase.PREFILLING, Phase.GONE}),
        Phase.PREFILLING: frozenset({Phase.RESTING, Phase.ENDED}),
        Phase.RESTING: frozenset({Phase.READY, Phase.SUSPENDING, Phase.RESTARTING, Phase.ENDED}),
        Phase.READY: frozenset({Phase.DECODING, Phase.SUSPENDING, Phase.RESTARTING, Phase.ENDED}),
        Phase.DECODING: frozenset({Phase.RESTING, Phase.READY, Phase.ENDED}),
        Phase.SUSPENDING: frozenset({Phase.SUSPENDED, Phase.ENDED}),
        Phase.SUSPENDED: frozenset({Phase.RESUMING, Phase.ENDED}),
        Phase.RESUMING: frozenset({Phase.READY, Phase.ENDED}),
        Phase.RESTARTING: frozenset({Phase.WAITING, Phase.GONE}),
        Phase.ENDED: frozenset({Phase.RELEASING, Phase.PARKING}),
        Phase.RELEASING: frozenset({Phase.GONE}),
        Phase.PARKING: frozenset({Phase.GONE}),
        Phase.GONE: frozenset(),
    }
)
