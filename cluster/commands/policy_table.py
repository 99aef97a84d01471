"""Policies beside each other: as a table in markdown, and as a picture."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from workers.bench.results import Row, compared
from workers.bench.settings import DECODE, PREFILL, CompareSettings

# Panels of a picture beside each other.
COLUMNS = 3


def table(rows: Sequence[Row], baseline: Row | None, settings: CompareSettings) -> str:
    """A line a cell; losses are in nats a token, behind them how much more than the baseline's they are."""
    headings = [
        "cell",
        "KV kept",
        *(f"loss behind {tokens}" for tokens in settings.prompts),
        *(["facts' gain kept"] if settings.talks else []),
        *(
            heading
            for name in settings.workloads
            for heading in (f"{name} prefill, s", f"{name} decode, tokens/s")
        ),
    ]
    lines = [headings, ["---"] * len(headings)]
    lines += [[row.cell, *_cells(row, baseline, settings)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, baseline: Row | None, settings: CompareSettings) -> list[str]:
    if row.error:
        return [row.error.replace("|", "/")]
    told: dict[str, float] = {**row.numbers, **compared(row, baseline)}

    def shown(name: str, style: str) -> str:
        return format(told[name], style) if name in told else ""

    cells = [shown(f"kept_{settings.prompts[-1]}", ".3f")]
    for tokens in settings.prompts:
        worse = "" if row == baseline else shown(f"worse_{tokens}", "+.2%")
        cells.append(shown(f"loss_{tokens}", ".3f") + (f" ({worse})" if worse else ""))
    if settings.talks:
        interval = f" ({shown('facts_low', '.0%')} to {shown('facts_high', '.0%')})"
        cells.append(shown("facts_kept", ".0%") + (interval if "facts_kept" in told else ""))
    for name in settings.workloads:
        cells += [shown(f"{name}_{PREFILL}", ".2f"), shown(f"{name}_{DECODE}", ".1f")]
    return cells


def draw(rows: Sequence[Row], baseline: Row | None, settings: CompareSettings, file: Path) -> None:
    """Draws each number over the share of KV that is kept, a line a policy and way to prefill.

    What the baseline has is dashed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    panels = {
        **{f"worse_{n}": f"loss behind {n} tokens, % over {_name(baseline)}" for n in settings.prompts},
        **({"facts_kept": "gain of facts kept, %"} if settings.talks else {}),
        **{f"{name}_{PREFILL}": f"{name} prefill, s" for name in settings.workloads},
        **{f"{name}_{DECODE}": f"{name} decode, tokens/s" for name in settings.workloads},
    }
    told = {row.cell: {**row.numbers, **compared(row, baseline)} for row in rows if not row.error}
    dashed = told.pop(baseline.cell, {}) if baseline else {}
    ways: dict[str, list[dict[str, float]]] = {}
    for cell, numbers in told.items():
        ways.setdefault(cell.partition("@")[0], []).append(numbers)
    height = ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(15, 4 * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, squeeze=False).flatten().tolist()
    for (name, label), panel in zip(panels.items(), axes, strict=False):
        panel.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
        scale = 100 if "%" in label else 1
        for way, each in ways.items():
            _line(panel, way, [(n[_kept(settings)], scale * n[name]) for n in each if name in n])
        if name in dashed:
            panel.axhline(scale * dashed[name], color="black", linestyle="--", label=_name(baseline))
        panel.set(xlabel="share of the prompt's KV kept", ylabel=label)
    for panel in axes[len(panels) :]:
        panel.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(file, dpi=110)


def _line(panel: Any, way: str, points: list[tuple[float, float]]) -> None:
    x, y = zip(*sorted(points), strict=True) if points else ((), ())
    panel.plot(x, y, marker="o", label=way)


def _kept(settings: CompareSettings) -> str:
    return f"kept_{settings.prompts[-1]}"


def _name(baseline: Row | None) -> str:
    return baseline.cell if baseline else ""
