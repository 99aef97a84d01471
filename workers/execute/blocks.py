"""Rows pass through a layer in blocks, which bounds what is alive between its products."""

from collections.abc import Iterator

import torch

from workers.model.llama import LlamaLayer


def blocks(rows: int, block_rows: int) -> Iterator[slice]:
    """Cuts ``rows`` rows into blocks of ``block_rows``."""
    for start in range(0, rows, block_rows):
        yield slice(start, min(start + block_rows, rows))


def finish(
    layer: LlamaLayer, hidden: torch.Tensor, attended: torch.Tensor, block_rows: int
) -> Iterator[None]:
    """Takes ``hidden`` [rows, hidden] through what follows attention, in place, block by block."""
    for block in blocks(len(hidden), block_rows):
        layer.finish(hidden[block], attended[block])
        yield
