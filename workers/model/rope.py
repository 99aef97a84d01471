"""Rotary position embeddings of every kind that LLaMA checkpoints use."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from workers.device import to_device
from workers.model.config import ModelConfig, transformers_config
from workers.model.scaling import rope_parameters

Rotation = tuple[torch.Tensor, torch.Tensor]
# Lengths whose frequencies are kept.
KNOWN = 256


class Rope:
    """The rotation of keys and queries by their input position.

    Some kinds have other frequencies for longer sequences (dynamic, longrope). Keys that are cached cannot
    follow them, so that they are those of all that a sequence may become, from its first token on:
    ``length`` is that, and the same for as long as its keys are used.
    """

    def __init__(self, checkpoint: Path, model: ModelConfig, device: torch.device) -> None:
        self._config, self._model, self._device = transformers_config(checkpoint), model, device
        self._kind = rope_parameters(self._config)["rope_type"]
        # By the lengths that they stand for; the last few of them.
        self._known: dict[int, Rotation] = {}

    def _compute(self, length: int) -> Rotation:
        """Inverse frequencies and scales of cosines and sines, fp32 [head size / 2]."""
        known = self._known.get(length)
        if known is not None:
            return known
        if self._kind == "default":
            partial = rope_parameters(self._config).get("partial_rotary_factor") or 1.0
            size = int(self._model.head_size * partial)
            exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
            frequencies, scale = 1 / rope_parameters(self._config)["rope_theta"] ** exponents, 1.0
        else:
            compute = ROPE_INIT_FUNCTIONS[self._kind]
            frequencies, scale = compute(self._config, torch.device("cpu"), seq_len=length or None)
        scales = torch.full_like(frequencies, scale)
        # What is not rotated lies behind, as if it were, by nothing; see ``weights``.
        still = self._model.head_size // 2 - len(frequencies)
        frequencies = torch.nn.functional.pad(frequencies, (0, still))
        scales = torch.nn.functional.pad(scales, (0, still), value=1.0)
        if len(self._known) >= KNOWN:
            del self._known[next(iter(self._known))]
        self._known[length] = frequencies.to(self._device), scales.to(self._device)
        return self._known[length]

    def rotation(self, positions: npt.NDArray[np.integer], lengths: list[tuple[int, int]]) -> Rotation:
        """Cosines and sines, each fp32 [rows, head size / 2].

        Args:
            positions: of every row, [rows]. Those beyond the context, whose angles fp32 would round by too
                much, are multiplied in fp64.
            lengths: (rows, most tokens that their sequence has ever) of every sequence, in order of rows.
        """
        counted = [(rows, self._model.frequencies_length(length)) for rows, length in lengths]
        if len({length for _, length in counted}) == 1:
            frequencies, scales = self._compute(counted[0][1])
        else:
            parts = [(self._compute(length), rows) for rows, length in counted]
            frequencies, scales = (
                torch.cat([part[which].expand(rows, -1) for part, rows in parts]) for which in (0, 1)
            )
        rows = to_device(positions.astype(np.int64), self._device)[:, None]
        angles, far = rows.float() * frequencies, positions >= self._model.context
        if far.any():
            angles = torch.where(to_device(far, self._device)[:, None], _angles(rows, frequencies), angles)
        return angles.cos() * scales, angles.sin() * scales

    def turned(self, keys: torch.Tensor, distances: npt.NDArray[np.int64], length: int) -> torch.Tensor:
        """Rotated keys as if they were at positions so much farther, fp32.

        Args:
            keys: [n, KV heads, head size].
            distances: of each, [n].
            length: the most tokens that their sequence has ever.
        """
        frequencies, _ = self._compute(self._model.frequencies_length(length))
        angles = _angles(to_device(distances, self._device)[:, None], frequencies)[:, None]
        (first, second), cos, sin = keys.float().chunk(2, dim=-1), angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _angles(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Of positions of any size, within a turn, fp32."""
    return (positions.double() * frequencies.double()).remainder(2 * math.pi).float()
