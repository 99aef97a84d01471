"""Gates: what tells by a token's key and value how much attention it will get. Loads without torch.

As KVzap (arXiv 2601.07891) has them, but that they look at what a cache holds: at keys and
values in the place of hidden states, and at keys by what their rotation leaves alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pyramidserve.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

# From keys and values, [tokens, 2, KV heads, head size], to fp32 [KV heads, tokens].
Gate = Callable[["torch.Tensor"], "torch.Tensor"]
WEIGHTS, MODEL = "weights", "model"
# Added to squares, so that their logarithms are finite.
LEAST = 1e-6
# Tokens that are looked at together.
BLOCK = 1024


@dataclass(frozen=True)
class Gates:
    """Those of a model.

    Attributes:
        model: fingerprint of those that they are of; see ``ModelConfig.fingerprint``.
        weights: of what ``features`` gives, fp32 [layers, KV heads, features].
    """

    model: str
    weights: npt.NDArray[np.float32]

    @property
    def digest(self) -> str:
        """What others that foresee the same have too."""
        return sha256(self.model.encode() + self.weights.tobytes()).hexdigest()[:8]

    def of(self, layer: int, device: "torch.device") -> Gate:
        """The gate of a ``layer`` of the model, for tensors on ``device``.

        It gives the logarithm of how much attention each token will get at most, times what its value adds
        to the layer's output.
        """
        import torch  # not at the top: descriptions load without torch

        return partial(_foreseen, torch.from_numpy(self.weights[layer]).to(device))

    def write(self, file: Path) -> None:
        """Writes what ``read_gates`` reads."""
        file.write_bytes(save({WEIGHTS: self.weights}, {MODEL: self.model}))


def read_gates(file: Path) -> Gates:
    """Raises ConfigurationError where ``file`` is not what ``pyramidserve calibrate`` writes."""
    try:
        with safe_open(file, "numpy") as opened:
            read = Gates((opened.metadata() or {})[MODEL], opened.get_tensor(WEIGHTS))
        if read.weights.ndim != 3 or read.weights.dtype != np.float32:
            raise ValueError(f"its weights are {read.weights.dtype}, {read.weights.shape}")
        if not np.isfinite(read.weights).all():
            raise ValueError("a weight is not finite")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigurationError(
            f"gates {str(file)!r} cannot be read: {error!r}; `pyramidserve calibrate` writes such files"
        ) from error
    return read


def features(kv: "torch.Tensor") -> "torch.Tensor":
    """What gates look at, of one head's keys and values, [tokens, 2, head size]; fp32 [tokens, features].

    Of a key, whose pairs turn with its position, the lengths of these and its own, as logarithms; of a
    value itself, its squares and its length; and 1.
    """
    import torch  # see above

    keys, values = kv.float().unbind(1)
    pairs = keys.square().view(len(keys), 2, -1).sum(dim=1)
    squares = values.square()
    lengths = torch.stack((pairs.sum(dim=1), squares.sum(dim=1)), dim=1)
    logs = (torch.cat((pairs, lengths), dim=1) + LEAST).log()
    return torch.cat((logs, values, squares, torch.ones_like(logs[:, :1])), dim=1)


def _foreseen(weights: "torch.Tensor", kv: "torch.Tensor") -> "torch.Tensor":
    import torch  # see above

    scores = weights.new_empty(len(weights), len(kv))
    for head, own in enumerate(weights):  # one by one and in blocks, as fp32 takes its room
        parts = torch.split(kv[:, :, head], BLOCK)
        scores[head] = torch.cat([features(part) @ own for part in parts])
    return scores
