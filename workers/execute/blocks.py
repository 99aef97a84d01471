"""Rows pass through a layer in blocks, which bounds what is alive between its products."""

from collections.abc import Iterator

import torch

from workers.execute.workspace import BLOCK_ROWS
from workers.model.llama import LlamaLayer


def blocks(rows: int) -> Iterator[slice]:
    """Cuts ``rows`` rows into blocks."""
    for start in range(0, rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, rows))


def finish(layer: LlamaLayer, hidden: torch.Tensor, attended: torch.Tensor) -> Iterator[None]:
    """Takes ``hidden`` [rows, hidden] through what follows attention, in place, block by block."""
    for block in blocks(len(hidden)):
        layer.finish(hidden[block], attended[block])
        yield
