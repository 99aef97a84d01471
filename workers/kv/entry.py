"""What a shard's cache knows of one sequence while it is there."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pyramidserve.types import LayerReceipt

Positions = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CacheNeeds:
    """What a sequence needs of the cache.

    Attributes:
        prompt_tokens: tokens of its prompt.
        score_width: scores, fp32, that are kept for it in every layer.
        whole: what is not on the device must be on the host.
        indexed: the keys on the host have an index on the device.
        hidden: hidden states may go to the host too.
    """

    prompt_tokens: int
    score_width: int = 0
    whole: bool = False
    indexed: bool = False
    hidden: bool = False


@dataclass
class CachedSequence:
    """One sequence's books.

    ``positions`` are the input positions of each layer's slots as of the last change of order; slots
    behind them hold the newest tokens in order. ``fed`` counts the tokens behind the prompt; ``recalled``
    those of each layer that came back from the host.
    """

    needs: CacheNeeds
    positions: list[Positions]
    recalled: list[int]
    fed: int = 0
    peak_pages: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and behind it, wherever they are."""
        return self.needs.prompt_tokens + self.fed

    def receipt(self, layer: int, first_layer: int, positions: Positions, spilled: int) -> LayerReceipt:
        """What became of the tokens of a ``layer`` that has those at ``positions``, and ``spilled``."""
        prompt = int((positions < self.needs.prompt_tokens).sum())
        return LayerReceipt(
            layer=first_layer + layer,
            prompt_kept=prompt,
            generated_kept=len(positions) - prompt,
            spilled=spilled,
            dropped=self.tokens - len(positions) - spilled,
            recalled=self.recalled[layer],
        )


@dataclass(frozen=True)
class GatheredLayer:
    """KV of one layer of a sequence, in order of positions.

    Attributes:
        positions: int32 [n].
        places: int64 [n], among the tokens on the host; -1 for those on the device.
        kv: [n, 2, KV heads, head size].
    """

    positions: Positions
    places: npt.NDArray[np.int64]
    kv: torch.Tensor
