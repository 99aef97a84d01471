"""The README's table of what was measured on cards: ``python -m bench.gpu.report [RESULTS.json ...]``."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.check import RESULTS, SECTIONS, is_wrong

HEADINGS = ("card", "model", "load", "", "batch", "KV GB", "step ms", "of the card's best", "tokens/s")
NOTHING = "No card has been measured yet: `python -m bench.gpu.check` does it, in at most eight minutes."


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: all in bench/gpu/results")
    files = parser.parse_args(arguments).results or sorted(RESULTS.glob("*.json"))
    print("\n".join(table([json.loads(file.read_text()) for file in files])))
    return 0


def table(checks: list[dict[str, Any]]) -> Iterator[str]:
    """The rows of a table of all checks, and of each what was found wrong or not looked at."""
    if not checks:
        yield NOTHING
        return
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|{'---|' * len(HEADINGS)}"
    for check in checks:
        for section in SECTIONS:
            for row in _rows(check, check.get(section, {})):
                yield f"| {' | '.join(row)} |"
    yield ""
    for check in checks:
        yield f"{check['card']['machine']['name']}, {check['date']}: {'; '.join(_outcomes(check))}."


def _rows(check: dict[str, Any], section: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    loads = {name: found for name, found in section.items() if "+" in name}
    for load, groups in loads.items():
        for group, by_policy in groups.items():
            for policy, found in by_policy.items():
                runs = found if isinstance(found, list) else [found]
                if not runs:
                    continue
                best = max(runs, key=lambda run: run["tokens_s"])
                ends = best["ends"]
                yield (
                    f"{check['card']['machine']['name']}, torch {check['card']['versions']['torch']}",
                    section["model"].removeprefix("random:"),
                    load,
                    f"{policy}, {group}",
                    str(best["batch"]),
                    f"{best['kv_gb']:.2f}",
                    " to ".join(f"{end['step_ms']:.1f}" for end in ends),
                    " to ".join(f"{end['roofline']:.0%}" for end in ends),
                    " and ".join(f"{run['tokens_s']:.0f}" for run in runs),
                )


def _outcomes(check: dict[str, Any]) -> Iterator[str]:
    for name in SECTIONS:
        section = check.get(name, {"skipped": "it was not reached"})
        if is_wrong(section):
            yield f"{name} went wrong ({section.get('error', 'see the file')})"
        elif left := section.get("skipped") or section.get("cut_short"):
            yield f"{name} is not whole ({left})"
        else:
            yield f"{name} as it should be"


if __name__ == "__main__":
    raise SystemExit(main())
