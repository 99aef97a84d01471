"""`pyramidserve bench quality`: how much answer each way to hold a KV cache keeps per byte."""

import argparse
import time
from pathlib import Path

import torch

from cluster.commands.policy import add_measured_arguments, use_measured
from cluster.commands.progress import Progress
from cluster.commands.quality_plot import draw
from cluster.commands.quality_table import table
from cluster.commands.serve import say
from workers.bench.cell import BASELINE, SHAPE, Cell, read_cell, usual, with_baseline
from workers.bench.quality import PARTS, USUAL_PARTS, Quality
from workers.bench.results import Results, Row
from workers.bench.settings import QualitySettings
from workers.device import open_device
from workers.engine.choose import choose_dtype
from workers.model.checkpoint import EMBEDDED
from workers.model.config import DTYPES
from workers.policies import registry
from workers.policies.registry import enable, versions

PICTURE = "quality.png"
SUMMARY = "how much answer each way to hold a KV cache keeps per byte"
DESCRIPTION = (
    f"{SUMMARY}, beside the full cache: loss on text behind long prompts, and agreement with the full "
    "cache's choice; facts in a document that are asked for later; instructions that a long turn follows; "
    "tasks after RULER, their questions known and unknown when the context is compressed; the solutions of "
    "HumanEval's problems; speed where it is asked for. What is in --out is not measured again: the same "
    "command goes on where it was stopped. How long the rest takes is said after each cell."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the subject."""
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    parser.add_argument(
        "--policies", nargs="+", default=[], metavar="NAME", help="of other packages, beside our own"
    )
    parser.add_argument(
        "--cells", nargs="+", default=[], metavar="NAME",
        help=f"{SHAPE}, the share of all KV's bytes in 16 bits, as in snapkv:int8@0.25, "
        f"pyramid/evict+turn@0.45, {BASELINE.name}; default: {len(usual())} of them",
    )  # fmt: skip
    add_measured_arguments(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(USUAL_PARTS), help="default: all but speed"
    )
    sizes = parser.add_argument_group("sizes")
    for name, lengths, meaning in (
        ("--prompts", [1024, 4096, 8064], "behind which text goes on"),
        ("--task-prompts", [1024, 2048, 4096], "of tasks"),
    ):
        sizes.add_argument(
            name, type=int, nargs="+", default=lengths, metavar="TOKENS",
            help=f"{meaning}; default: {' '.join(map(str, lengths))}",
        )  # fmt: skip
    for name, default, unit, meaning in (
        ("--goes-on", 128, "TOKENS", "of text behind a prompt"),
        ("--texts", 24, "N", "of each length"),
        ("--talks", 24, "N", "with four questions each, and as many chats with instructions"),
        ("--document", 1200, "TOKENS", "that a talk is about"),
        ("--tasks", 1, "N", "of each kind and length"),
    ):
        help_text = f"{meaning}; default: {default}"
        sizes.add_argument(name, type=int, default=default, metavar=unit, help=help_text)
    sizes.add_argument(
        "--workloads", nargs="+", default=["W2", "W3"], metavar="NAME",
        help="of speed, as `bench engine` has them; default: W2 W3",
    )  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="begin no cell that would take longer than these"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"of quality.json, quality.csv and {PICTURE}"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures what is not yet there; prints and draws all. 1 where a cell has failed."""
    enable(arguments.policies, "--policies names")
    use_measured(arguments)
    settings = _settings(arguments)
    cells = with_baseline(map(read_cell, arguments.cells) if arguments.cells else usual(arguments.policies))
    parts = [part for part in PARTS if part in arguments.parts]
    results = Results(settings, versions(arguments.policies), arguments.out)
    names = {cell.name for cell in cells}
    missing = results.missing(cells, parts)
    there = [cell.name for cell in cells if cell not in missing]
    if there:
        say(f"{arguments.out} has {len(there)} of {len(cells)} cells already: {', '.join(there)}")
    if missing:
        torch.set_num_threads(settings.threads)
        lacking = [part for part in parts if any(part in each for each in missing.values())]
        _measure(missing, results, Quality(settings, lacking, say), arguments.budget)
    print(table(results))
    if arguments.out:
        draw(results, arguments.out / PICTURE)
    return int(any(row.error_of(parts) for name, row in results.rows.items() if name in names))


def _settings(arguments: argparse.Namespace) -> QualitySettings:
    dtype = choose_dtype(arguments.dtype, open_device(arguments.device))
    return QualitySettings(
        model=arguments.model,
        dtype=str(dtype).removeprefix("torch."),
        device=arguments.device,
        threads=arguments.threads,
        prompts=tuple(sorted(set(arguments.prompts))),
        goes_on=arguments.goes_on,
        texts=arguments.texts,
        talks=arguments.talks,
        document=arguments.document,
        task_prompts=tuple(sorted(set(arguments.task_prompts))),
        tasks=arguments.tasks,
        workloads=tuple(dict.fromkeys(arguments.workloads)),
    )


def _measure(
    missing: dict[Cell, list[str]], results: Results, quality: Quality, budget: float | None
) -> None:
    """Measures one by one, and says how long the rest takes."""
    for cell in missing:
        quality.holding(cell).asks(quality.longest)  # what cannot be is refused before all is measured
    had = {cell: [part for part in parts if part in quality.parts] for cell, parts in missing.items()}
    work = {cell: parts for cell, parts in had.items() if parts}
    tokens = {cell: sum(map(quality.prompt_tokens, parts)) for cell, parts in work.items()}
    say(f"measuring {len(work)} cells, which read up to {sum(tokens.values()):,} tokens of prompts")
    progress, began = Progress(sum(tokens.values())), time.perf_counter()
    for number, (cell, parts) in enumerate(work.items(), 1):
        spent = (time.perf_counter() - began) / 60
        # As long as the mean cell so far.
        if budget is not None and spent * number > budget * (number - 1) and number > 1:
            say(f"--budget {budget:g} is used up: {len(work) - number + 1} cells are left for another time")
            return
        for part in parts:
            _measure_part(cell, part, results, quality, progress)
        progress.clear()
        error = results.rows[cell.name].error_of(parts)
        say(
            f"{number} of {len(work)}, {cell.name}: {error or 'done'} after "
            f"{time.perf_counter() - began - 60 * spent:.0f} s; "
            f"about {progress.left() / 60:.0f} minutes are left"
        )
        if cell == BASELINE and error:
            say(f"{cell.name} has failed, and there is nothing to compare with")
            return


def _measure_part(cell: Cell, part: str, results: Results, quality: Quality, progress: Progress) -> None:
    policy, began = registry.POLICIES[cell.compression.policy], time.perf_counter()
    row = Row(cell.method, policy.name, policy.version, quality.holding(cell).shares.token)
    full = None if cell == BASELINE else results.found(BASELINE.name, part)
    read = 0

    def done(tokens: int) -> None:
        nonlocal read
        read += tokens
        progress(tokens, f"{cell.name}, {part}")

    try:
        found = quality.measure(cell, part, full, done)
    except Exception as error:  # a policy's, which others have no part in
        results.fail(cell.name, row, part, " ".join(f"{type(error).__name__}: {error}".split()))
    else:
        results.add(cell.name, row, part, found, time.perf_counter() - began)
    progress(quality.prompt_tokens(part) - read, f"{cell.name}, {part}")
