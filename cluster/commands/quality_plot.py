"""Quality over the bytes that are kept, as a picture."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from workers.bench.cell import BASELINE
from workers.bench.results import Results

# Panels of a picture beside each other.
COLUMNS = 3
# How lines are drawn by what is in the name of their method.
STYLES = {"+": "-.^", ":int8": "--s", ":int4": ":D"}


def draw(results: Results, file: Path) -> None:
    """A panel each number, over the bytes that are kept of those in 16 bits; a line a method.

    What holds all tokens is a point.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    summaries = results.summaries()
    panels = _panels(summaries)
    methods: dict[str, list[Mapping[str, float]]] = {}
    for cell, told in summaries.items():
        if cell != BASELINE.name:
            methods.setdefault(results.rows[cell].method, []).append(told)
    policies = list(dict.fromkeys(_policy(method) for method in methods))
    colors = matplotlib.color_sequences["tab20"]
    height = max(1, ceil(len(panels) / COLUMNS))
    figure = Figure(figsize=(15, 4 * height), layout="constrained")
    axes = figure.subplots(height, COLUMNS, squeeze=False).flatten().tolist()
    for (name, (over, label)), panel in zip(panels.items(), axes, strict=False):
        for method, each in methods.items():
            color = colors[policies.index(_policy(method)) % len(colors)]
            _line(panel, method, color, [told for told in each if name in told], name, over)
        panel.set(xlabel="bytes of all KV in 16 bits", ylabel=label, xlim=(0, None))
        if name.startswith("worse"):
            panel.set_yscale("symlog", linthresh=1)
            panel.yaxis.set_major_formatter("{x:g}")
        panel.axhline(100 * summaries[BASELINE.name][name], color="black", linewidth=0.8, label="full")
    for panel in axes[len(panels) :]:
        panel.remove()
    if panels:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(file, dpi=110)


def _panels(summaries: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, str]]:
    """The numbers that the baseline has, over what they are drawn, and what their axes say."""
    there = summaries.get(BASELINE.name, {})
    lengths = [name.removeprefix("loss_") for name in there if name.startswith("loss_")]
    behind = [name for name in lengths if name.isdecimal()]
    panels = {f"worse_{name}": (f"bytes_{name}", f"loss behind {name} tokens, % more") for name in behind}
    for name in behind[-1:]:
        panels[f"agree_{name}"] = (f"bytes_{name}", f"choices that are full's behind {name}, %")
    panels |= {
        "facts_kept": ("bytes_facts", "planted facts asked later, % of the gain"),
        "instructions": ("bytes_instructions", "instructions, % of the gain"),
        "asked": ("bytes_instructions", "facts asked beside instructions, % of the gain"),
        "unseen": ("bytes_unseen", "tasks, question unseen, % of the gain"),
        "seen": ("bytes_seen", "tasks, question seen, % of the gain"),
        "worse_humaneval": ("bytes_humaneval", "loss of HumanEval's solutions, % more"),
    }
    return {name: axes for name, axes in panels.items() if name in there}


def _policy(method: str) -> str:
    """What a color is of."""
    return method.partition(":")[0].partition("+")[0]


def _line(
    panel: Any, method: str, color: Any, told: Sequence[Mapping[str, float]], name: str, over: str
) -> None:
    stem = name.removesuffix("_kept")
    points = sorted(
        (each[over], *(100 * each[part] for part in (name, f"{stem}_low", f"{stem}_high"))) for each in told
    )
    x, y, low, high = zip(*points, strict=True) if points else ((), (), (), ())
    style = next((style for mark, style in STYLES.items() if mark in method), "-o")
    panel.plot(x, y, style, markersize=4, color=color, label=method)
    panel.vlines(x, low, high, color=color, linewidth=0.6)
