"""What a shard's cache knows of one sequence while it is there."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.types import LayerReceipt
from workers.device import to_device

_Integer = TypeVar("_Integer", bound=np.integer)
# Input positions, int32: of rows [rows]; of what a layer holds [sets, tokens], ascending in each set: one
# set that serves all KV heads, or one for each. Slot s of a layer then has a token of its own for each.
Positions = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CacheNeeds:
    """What a sequence needs of the cache.

    Attributes:
        prompt_tokens: tokens of its prompt.
        score_width: scores, fp32, that are kept for it in every layer, ``score_rows`` times.
        sets: KV heads if each has tokens of its own, else 1.
        whole: what is not on the device must be on the host.
        mirrored: so must what is, in the format that is the host's.
        indexed: the keys on the host have an index on the device.
        hidden: hidden states may go to the host too.
        sinks: first tokens, of one set, that stay and come nearer to the newest as those between them go.
        length: the most tokens that it may have, which the rotation of its keys may hang on.
    """

    prompt_tokens: int
    score_width: int = 0
    score_rows: int = 1
    sets: int = 1
    whole: bool = False
    mirrored: bool = False
    indexed: bool = False
    hidden: bool = False
    sinks: int = 0
    length: int = 0


@dataclass
class CachedSequence:
    """One sequence's books.

    ``positions`` are the input positions of each layer's slots as of the last change of order; slots
    behind them hold the newest tokens in order. ``fed`` counts the tokens behind the prompt; ``recalled``
    those of each layer that came back from the host; ``unbroken``, where the newest tokens are finer, is
    the position from which on each layer has all tokens, in its last slots. ``moved`` says by how many
    positions the sinks' keys in each layer have come nearer; ``reused``, of how many tokens KV was found.
    """

    needs: CacheNeeds
    positions: list[Positions]
    recalled: list[int]
    unbroken: npt.NDArray[np.int64]
    moved: npt.NDArray[np.int64]
    reused: int = 0
    fed: int = 0
    peak_pages: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and behind it, wherever they are."""
        return self.needs.prompt_tokens + self.fed

    def places(self, layer: int, positions: Positions) -> Positions:
        """``positions`` of what ``layer`` holds, of sinks those that they have moved to."""
        if not self.moved[layer]:
            return positions
        places = positions.copy()
        places[:, : self.needs.sinks] += self.moved[layer]
        return places

    def receipt(self, layer: int, first_layer: int, positions: Positions, spilled: int) -> LayerReceipt:
        """What became of the tokens of a ``layer`` that has those at ``positions``, and ``spilled``."""
        kept = positions.shape[1]
        if self.needs.mirrored:
            spilled -= kept
        # Where heads have tokens of their own, as many as they have on average.
        prompt = round((positions < self.needs.prompt_tokens).sum() / len(positions))
        return LayerReceipt(
            layer=first_layer + layer,
            prompt_kept=prompt,
            generated_kept=kept - prompt,
            spilled=spilled,
            dropped=self.tokens - kept - spilled,
            recalled=self.recalled[layer],
        )


@dataclass(frozen=True)
class GatheredLayer:
    """KV of one layer of a sequence, in order of positions, in each set.

    Attributes:
        positions: int32 [sets, n].
        places: int64 [sets, n], among the tokens on the host; -1 for those on the device.
        kv: [n, 2, KV heads, head size].
    """

    positions: Positions
    places: npt.NDArray[np.int64]
    kv: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens of each set."""
        return len(self.kv)


def unbroken_from(positions: Positions, tokens: int, most: int) -> int:
    """The position from which on every set has all of ``tokens`` tokens; ``most`` are looked at."""
    last = positions[:, positions.shape[1] - min(most, positions.shape[1]) :]
    there = (last[:, ::-1] == np.arange(tokens - 1, tokens - 1 - last.shape[1], -1)).all(axis=0)
    return tokens - int(np.logical_and.accumulate(there).sum())


def take_sets(kv: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Takes tokens, for each KV head its own.

    Args:
        kv: [n, 2, KV heads, head size].
        index: int64 [sets, m]; one set is of all KV heads.

    Returns:
        [m, 2, KV heads, head size].
    """
    if len(index) == 1:
        return kv[index[0]]
    return kv.gather(0, index.T[:, None, :, None].expand(-1, 2, -1, kv.shape[-1]))


def with_rows(held: npt.NDArray[_Integer], rows: npt.NDArray[np.integer]) -> npt.NDArray[_Integer]:
    """``held`` [sets, n] with ``rows`` [m] behind every set."""
    return np.concatenate((held, np.broadcast_to(rows.astype(held.dtype), (len(held), len(rows)))), axis=1)


def in_order(positions: Positions, places: npt.NDArray[np.int64], kv: torch.Tensor) -> GatheredLayer:
    """Tokens in order of ``positions`` [sets, n]."""
    order = positions.argsort(axis=1)
    return GatheredLayer(
        np.take_along_axis(positions, order, axis=1),
        np.take_along_axis(places, order, axis=1),
        take_sets(kv, to_device(order, kv.device)),
    )


def among(index: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.bool_]:
    """Which of ``tokens`` tokens are in ``index`` [..., m], bool [..., tokens]."""
    found = np.zeros((*index.shape[:-1], tokens), dtype=bool)
    np.put_along_axis(found, index, True, axis=-1)
    return found


def indices(marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Where each set of ``marked`` [sets, tokens], of which as many are, int64 [sets, m]."""
    return np.nonzero(marked)[1].reshape(len(marked), -1)
