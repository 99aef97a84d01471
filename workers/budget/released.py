"""What a shard says of a sequence that goes. Pure."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyramidserve.types import LayerReceipt


@dataclass(frozen=True)
class ReleasedSequence:
    """What a sequence held on the shard; ``peak_pages`` include ``score_pages``.

    ``workspace_bytes`` were the activations of its prefill; ``device_peak_bytes`` is the most that the
    shard's allocator had handed out by then, to whomever. ``positions``: where it was traced, of what each
    layer had on the device, int32 [sets, tokens].
    """

    layers: tuple[LayerReceipt, ...]
    peak_pages: int
    score_pages: int
    page_bytes: int
    table_bytes: int
    spilled_bytes: int
    recalled_bytes: int
    dropped_bytes: int
    attended_bytes: int
    workspace_bytes: int = 0
    device_peak_bytes: int = 0
    positions: tuple[npt.NDArray[np.int32], ...] = ()
