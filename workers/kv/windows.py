"""Which tokens a new one attends to in layers that have a window. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from workers.kv.entry import CachedSequence, Positions


def unseen_slots(
    fed: Sequence[int],
    windows: Sequence[int],
    entries: dict[int, CachedSequence],
    positions: Callable[[int, int], Positions],
) -> npt.NDArray[np.int32]:
    """How many slots lie before those that new tokens attend to, int32 [layers, new tokens].

    Args:
        fed: the sequence of each of them, which are the newest that there are.
        windows: of each layer, the newest positions that are attended to, a token's own among them; 0: all.
        positions: of the slots of a sequence's layer, of which there is one set.
    """
    unseen, row = np.zeros((len(windows), len(fed)), dtype=np.int32), 0
    for sequence, count in Counter(fed).items():
        tokens = entries[sequence].tokens
        for layer, window in enumerate(windows):
            if window:
                last = np.arange(tokens - count, tokens) - window  # the newest that each does not attend to
                before = np.searchsorted(positions(sequence, layer)[0], last, side="right")
                unseen[layer, row : row + count] = before
        row += count
    return unseen


def not_yet_there(gone: npt.NDArray[np.bool_], positions: Positions, held: Positions) -> int:
    """Takes from ``gone``, bool [tokens], what ``held`` begins with; returns how many those are.

    Positions, of one set, are in order: what is behind them is to be written anew, so that it stays so.
    """
    new = positions[gone]
    count = min(len(new), len(held))
    differ = new[:count] != held[:count]
    same = int(differ.argmax()) if differ.any() else count
    gone[np.flatnonzero(gone)[:same]] = False
    return same
