"""Keys of tokens on the host, on the device at an eighth of their size: to find those that matter."""

from collections.abc import Sequence

import torch

from workers.budget.footprint import index_rows
from workers.device import to_device
from workers.kv.page_table import PageTables
from workers.kv.pool import KVPool, PagedLayers
from workers.kv.rows import bytes_as_rows, head_size_of, row_format, rows_as_bytes


class SpilledKeys:
    """Quantised keys, per channel and layer, of the tokens that a sequence has on the host, in their order.

    A number has an eighth of its bits, 2 at least, between the least and the greatest of the first keys
    that were spilled. They lie in pages of the pool, as they take the device's memory: ``keys_per_row`` of
    its format in a row, behind the rows that scale them.
    """

    def __init__(self, pool: KVPool, sequences: int, layers: int, max_tokens: int) -> None:
        """For so many ``sequences`` of at most ``max_tokens`` tokens."""
        self._pool, self._layers = pool, layers
        self._form = row_format(pool.rows.dtype)
        self.tables = PageTables(pool.allocator, sequences, layers, index_rows(max_tokens, self._form))
        self._bits = self._form.index_bits
        self._per_byte = 8 // self._bits
        self._shifts = torch.arange(0, 8, self._bits, dtype=torch.uint8, device=pool.rows.device)

    def __contains__(self, sequence: int) -> bool:
        return _name(sequence) in self.tables

    def open(self, sequence: int) -> None:
        """Begins to index ``sequence``."""
        self.tables.open(_name(sequence))

    def close(self, sequence: int) -> None:
        """Gives the pages back."""
        self.tables.close(_name(sequence))

    def rename(self, sequence: int, name: int) -> None:
        """Calls ``sequence`` by another name."""
        self.tables.rename(_name(sequence), _name(name))

    def pages(self, sequence: int) -> int:
        """Pages that the index of ``sequence`` takes."""
        return self.tables.pages_of(_name(sequence)) if sequence in self else 0

    def read(self, sequence: int, layer: int) -> torch.Tensor:
        """A copy of the rows of a layer's index."""
        return self._pool.read(self._rows(sequence, layer))

    def write(self, sequence: int, layer: int, rows: torch.Tensor) -> None:
        """Makes ``rows``, as ``read`` returned them, a layer's index."""
        self.tables.resize(_name(sequence), layer, len(rows))
        self._pool.write(self._rows(sequence, layer), rows)

    def clear(self, sequence: int, layer: int) -> None:
        """Empties a layer's index."""
        self.tables.resize(_name(sequence), layer, 0)

    def append(self, sequence: int, layer: int, keys: torch.Tensor, before: int) -> None:
        """Indexes ``keys`` [n, KV heads, head size] behind those of ``before`` tokens.

        Raises OutOfPagesError, changing nothing, when they find no room.
        """
        if not len(keys):
            return
        flat = keys.reshape(len(keys), -1).float()
        form, per_row = self._form, self._form.keys_per_row
        self.tables.resize(_name(sequence), layer, index_rows(before + len(keys), form))
        rows = self._rows(sequence, layer)
        scaling = rows[: form.index_scale_rows]
        if not before:
            least, most = flat.aminmax(dim=0)
            step = ((most - least) / (2**self._bits - 1)).clamp(min=1e-6)
            scales = torch.cat((least, step)).to(_scale_dtype(self._pool.rows))
            with_scales = bytes_as_rows(scales[None], self._pool.rows)
            self._pool.write(scaling[: len(with_scales)], with_scales)
        least, step = index_scales(self._pool.read(scaling))
        codes = ((flat - least) / step).round_().clamp_(0, 2**self._bits - 1).to(torch.uint8)
        begun = before % per_row
        row = form.index_scale_rows + before // per_row
        if begun:
            codes = torch.cat((unpack(self._pool.read(rows[row : row + 1]))[:begun], codes))
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per_row))
        packed = codes.view(-1, self._per_byte, codes.shape[1]) << self._shifts[:, None]
        packed = packed.sum(dim=1, dtype=torch.uint8).view(len(codes) // per_row, -1)
        self._pool.write(rows[row:], bytes_as_rows(packed, self._pool.rows))

    def batch(self, sequences: Sequence[int]) -> PagedLayers:
        """Where the indexes of sequences lie, in rows: what scales one first, then its keys."""
        pages, lengths = self.tables.batch([_name(sequence) for sequence in sequences])
        device = self._pool.rows.device
        return PagedLayers(self._pool.rows, to_device(pages, device), to_device(lengths, device))

    def _rows(self, sequence: int, layer: int) -> torch.Tensor:
        name = _name(sequence)
        rows = self.tables.rows(name, layer, 0, self.tables.length(name, layer))
        return to_device(rows, self._pool.rows.device)


def unpack(rows: torch.Tensor) -> torch.Tensor:
    """The quantised keys in rows of an index, as numbers.

    Args:
        rows: [..., rows, 2, KV heads, width].

    Returns:
        uint8 [..., rows * keys in a row, KV heads * head size].
    """
    form, channels = row_format(rows.dtype), _channels(rows)
    bits = form.index_bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    packed = rows_as_bytes(rows, form.keys_per_row * bits * channels // 8, torch.uint8)
    packed = packed.view(*rows.shape[:-4], -1, 1, channels)
    return (packed >> shifts[:, None]).bitwise_and_(2**bits - 1).flatten(-3, -2)


def index_scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of each channel's keys and the steps above it, fp32 [..., KV heads * head size].

    Args:
        rows: the first of an index, which scale it, [..., rows, 2, KV heads, width].
    """
    # The channels' numbers go from row to row.
    flat = rows.flatten(-4, -3)
    least, step = rows_as_bytes(flat, 2 * _channels(rows), _scale_dtype(rows)).float().chunk(2, dim=-1)
    return least, step


def _channels(rows: torch.Tensor) -> int:
    return rows.shape[-2] * head_size_of(rows)


def _scale_dtype(rows: torch.Tensor) -> torch.dtype:
    return rows.dtype if rows.dtype.is_floating_point else torch.bfloat16


def _name(sequence: int) -> tuple[int, str]:
    return sequence, "keys"
