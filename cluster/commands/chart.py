"""The pyramid as a chart in the terminal: per layer, what is on the device, spilled, dropped."""

from collections.abc import Sequence

from pyramidserve.types import LayerReceipt

KEPT, SPILLED, DROPPED = "█", "▒", "·"


def pyramid_chart(layers: Sequence[LayerReceipt], width: int = 60) -> str:
    """One line a layer, ``width`` characters for all tokens; every kind that is there shows."""
    lines = [f"layer  {KEPT} on the device  {SPILLED} spilled to the host  {DROPPED} dropped"]
    for layer in layers:
        kept = layer.prompt_kept + layer.generated_kept
        counts = (kept, layer.spilled, layer.dropped)
        cells = _share(counts, width)
        bar = "".join(kind * count for kind, count in zip((KEPT, SPILLED, DROPPED), cells, strict=True))
        lines.append(f"{layer.layer:5}  {bar}  {kept} / {layer.spilled} / {layer.dropped}")
    return "\n".join(lines)


def _share(counts: Sequence[int], width: int) -> list[int]:
    """Divides ``width`` cells in proportion; what is not nothing gets at least one."""
    total = sum(counts)
    cells = [max(1, round(width * count / total)) if count else 0 for count in counts]
    cells[cells.index(max(cells))] += width - sum(cells)
    return cells
