"""Cells beside each other, in markdown."""

from collections.abc import Mapping

from workers.bench.cell import BASELINE
from workers.bench.results import Results
from workers.bench.settings import DECODE, PREFILL

# A column's name, its heading and how its numbers are written; as many as there are.
SHARES = {
    "facts_kept": "facts' gain kept",
    "instructions": "instructions' gain kept",
    "asked": "gain kept of what is asked beside them",
    "unseen": "tasks, question unseen",
    "seen": "tasks, question seen",
}


def table(results: Results) -> str:
    """A line a cell, with 95 % intervals; losses in nats a token, and how much more than the baseline's."""
    summaries = results.summaries()
    there = dict.fromkeys(name for each in summaries.values() for name in each)
    read = [name.removeprefix("loss_") for name in there if name.startswith("loss_")]
    shares = {name: heading for name, heading in SHARES.items() if name in there}
    timed = [name.removesuffix(f"_{PREFILL}") for name in there if name.endswith(PREFILL)]
    headings = [
        "cell",
        "bytes kept",
        *(heading for name in read for heading in (f"loss {_behind(name)}", "agreement")),
        *shares.values(),
        *(heading for name in timed for heading in (f"{name} prefill, s", f"{name} decode, tokens/s")),
    ]
    lines = [headings, ["---"] * len(headings)]
    for cell, told in summaries.items():
        row = results.rows[cell]
        if error := row.error_of(row.errors):
            lines.append([cell, error.replace("|", "/")])
            continue
        line = [cell, _number(told, _bytes(told), ".3f")]
        for name in read:
            worse = "" if cell == BASELINE.name else _interval(told, f"worse_{name}", "+.2%")
            lost = _number(told, f"loss_{name}", ".3f") + (f" ({worse})" if worse else "")
            line += [lost, _interval(told, f"agree_{name}", ".1%")]
        line += [_interval(told, name, ".0%") for name in shares]
        for name in timed:
            line += [_number(told, f"{name}_{PREFILL}", ".2f"), _number(told, f"{name}_{DECODE}", ".1f")]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bytes(told: Mapping[str, float]) -> str:
    """The column of the bytes behind the longest prompt, or of those that there are."""
    columns = [name for name in told if name.startswith("bytes_")]
    return next(iter([name for name in reversed(columns) if name[6:].isdecimal()] + columns), "")


def _behind(name: str) -> str:
    return f"behind {name}" if name.isdecimal() else "of HumanEval's solutions"


def _number(told: Mapping[str, float], name: str, style: str) -> str:
    return format(told[name], style) if name in told else ""


def _interval(told: Mapping[str, float], name: str, style: str) -> str:
    if name not in told:
        return ""
    stem = name.removesuffix("_kept")
    value, low, high = (told[each] for each in (name, f"{stem}_low", f"{stem}_high"))
    return f"{value:{style}}, {low:{style}} to {high:{style}}"
