"""The safetensors files of a checkpoint: every tensor in them is a model's, or is refused by name."""

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pyramidserve.errors import CheckpointError
from workers.model.quantised import (
    QUANTISED,
    SCALES,
    WITHOUT_VALUE,
    Block,
    dequantised,
    scale_blocks,
    scale_of,
)

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# What checkpoints hold beside weights: frequencies that follow from config.json.
HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")
NAMED = 5


class CheckpointFiles:
    """The tensors of a checkpoint folder, read one at a time, as plain numbers."""

    def __init__(self, checkpoint: Path) -> None:
        """Reads the files' headers. Raises CheckpointError."""
        self.checkpoint = checkpoint
        self._files: dict[str, Path] = {}
        self._block = _block(checkpoint)
        index = checkpoint / INDEX
        try:
            if index.is_file():
                weight_map = json.loads(index.read_text())["weight_map"]
                parts = {checkpoint / file for file in weight_map.values()}
            else:
                parts = {checkpoint / WHOLE}
            for part in sorted(parts):
                with safe_open(part, "pt") as tensors:
                    self._files |= dict.fromkeys(tensors.keys(), part)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the weights of {checkpoint} cannot be read: {error}; "
                f"{WHOLE} (or its index and all its parts) must be there and whole"
            ) from error

    def __len__(self) -> int:
        return len(self._files)

    def check_names(self, expected: Collection[str], unused: Collection[str] = ()) -> None:
        """Raises CheckpointError unless the files hold ``expected`` and nothing that is not known.

        Args:
            unused: tensors that may be there, and are not read.
        """
        beside = (*SCALES, *WITHOUT_VALUE, "weight_format")
        known = {*expected, *unused}
        stems = [name.removesuffix("weight") for name in expected if name.endswith(".weight")]
        known |= {stem + suffix for stem in stems for suffix in beside}
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise CheckpointError(f"{self.checkpoint} lacks {listed(missing)}; is it a LLaMA, whole?")
        unknown = [name for name in self._files if name not in known and not HARMLESS.fullmatch(name)]
        if unknown:
            raise CheckpointError(
                f"{self.checkpoint} has tensors that its config.json says nothing of: {listed(unknown)}; "
                "without them the model would not be the one that was trained"
            )

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor of floats. Raises CheckpointError if it is not there, damaged or not such."""
        tensor = self._raw(name)
        scale = scale_of(name, self._files.__contains__)
        if scale is not None and tensor.dtype in QUANTISED and tensor.dim() == 2:
            layout = f"{name}_format"
            if layout in self._files and self._raw(layout).item() != 0:
                raise CheckpointError(
                    f"{name!r} of {self.checkpoint} is not in rows, but for a GPU's int8 products"
                )
            return dequantised(scale, tensor, self._raw(scale), self._block)
        if not tensor.is_floating_point() or tensor.dtype in QUANTISED:
            raise CheckpointError(
                f"{name!r} of {self.checkpoint} is of {str(tensor.dtype).removeprefix('torch.')}, and no "
                "scale is beside it; weights are floats of 16 bits or more, or 8 bits with a scale"
            )
        return tensor

    def _raw(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self._files[name], "pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"tensor {name!r} cannot be read from {self._files[name]}: {error}"
            ) from error
        return tensor


def _block(checkpoint: Path) -> Block | None:
    quantisation = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    try:
        return scale_blocks(quantisation)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error.message}") from error


def listed(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
