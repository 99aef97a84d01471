"""Rotary position embeddings of every kind that LLaMA checkpoints use."""

from pathlib import Path

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from workers.model.config import rope_parameters, transformers_config

Rotation = tuple[torch.Tensor, torch.Tensor]


class Rope:
    """The rotation of keys and queries by their input position."""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        self._config = transformers_config(checkpoint)
        self._type = rope_parameters(self._config)["rope_type"]
        self._trained_length = self._config.max_position_embeddings
        self._device = device
        self._frequencies, self._scaling = self._compute(self._trained_length)

    def _compute(self, length: int) -> tuple[torch.Tensor, float]:
        """Inverse frequencies, fp32 [head size / 2], for a sequence of ``length`` tokens."""
        if self._type == "default":
            frequencies, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(self._config)
        else:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[self._type](
                self._config, torch.device("cpu"), seq_len=length
            )
        return frequencies.to(self._device), scaling

    def rotation(self, positions: torch.Tensor, lengths: list[tuple[int, int]]) -> Rotation:
        """Cosines and sines, each fp32 [rows, head size / 2].

        Args:
            positions: input position of every row, int64 [rows].
            lengths: (rows, length of their sequence so far) of every sequence, in order of rows; the
                dynamic kind rotates by the length, beyond the trained one.
        """
        frequencies = self._frequencies
        if self._type == "dynamic" and any(n > self._trained_length for _, n in lengths):
            frequencies = torch.cat(
                [
                    self._compute(max(length, self._trained_length))[0].expand(rows, -1)
                    for rows, length in lengths
                ]
            )
        angles = positions[:, None].float() * frequencies
        return angles.cos() * self._scaling, angles.sin() * self._scaling
