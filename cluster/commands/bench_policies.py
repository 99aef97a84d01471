"""`pyramidserve bench policies`: what each policy loses, and how fast it is."""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch

from cluster.commands.policy import USUAL_KEEP
from cluster.commands.policy_table import draw, table
from cluster.commands.serve import say
from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import BASELINE, Cell, all_cells, chosen
from workers.bench.comparison import Comparison
from workers.bench.results import Results, Row
from workers.bench.settings import CompareSettings
from workers.device import open_device
from workers.engine.choose import choose_dtype
from workers.model.checkpoint import EMBEDDED
from workers.model.config import DTYPES
from workers.policies import registry
from workers.policies.registry import enable, versions

KV_KEEPS = (USUAL_KEEP, 0.25)
# Of the picture, by the ends of their names.
PICTURES = (".png", ".pdf", ".svg")
SUMMARY = "what each policy loses beside the full cache, and how fast it is"
DESCRIPTION = (
    f"{SUMMARY}: loss on text behind long prompts, facts in a document that are asked for later, prefill "
    "and decode. The usual sizes prefill about 110,000 tokens a cell: 24 cells take 90 minutes where that "
    "takes four, at 500 tokens a second; after each cell it is said how long the rest takes. Fewer "
    "--cells, --texts and --talks and smaller --workloads take less; what is in the --csv is not measured "
    "again."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the subject."""
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    parser.add_argument(
        "--policies", nargs="+", default=[], metavar="NAME", help="of other packages, beside our own"
    )
    parser.add_argument(
        "--kv-keep", type=float, nargs="+", default=KV_KEEPS, metavar="SHARE", help="of the prompt's KV; "
        f"default: {' '.join(map(str, KV_KEEPS))}",
    )  # fmt: skip
    parser.add_argument(
        "--cells", nargs="+", default=[], metavar="NAME",
        help=f"these alone, as in pyramid/evict@{USUAL_KEEP}, and {BASELINE.name}; default: all policies, "
        "prefills and shares",
    )  # fmt: skip
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--prompts", type=int, nargs="+", default=[1024, 4096], metavar="TOKENS",
        help="behind which text goes on; default: 1024 4096",
    )  # fmt: skip
    for name, default, unit, meaning in (
        ("--goes-on", 256, "TOKENS", "of text behind a prompt"),
        ("--texts", 6, "N", "of each length"),
        ("--talks", 24, "N", "with four questions each; 0: none"),
        ("--document", 1200, "TOKENS", "that a talk is about"),
    ):
        help_text = f"{meaning}; default: {default}"
        sizes.add_argument(name, type=int, default=default, metavar=unit, help=help_text)
    sizes.add_argument(
        "--workloads", nargs="*", default=["W2", "W3"], metavar="NAME",
        help="as `bench engine` has them; default: W2 W3",
    )  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="a row a cell; those that are there are not measured again"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw all over the share that is kept")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures the cells that are not yet there; prints and draws all. 1 where one has failed."""
    settings = _settings(arguments)
    enable(arguments.policies, "--policies names")
    cells = chosen(all_cells(arguments.kv_keep, arguments.policies), arguments.cells)
    _check_plot(arguments.plot)
    results = Results(settings, versions(arguments.policies), arguments.csv)
    missing = results.missing(cells)
    there = [cell.name for cell in cells if cell not in missing]
    if there:
        say(f"{arguments.csv} has {len(there)} of {len(cells)} cells already: {', '.join(there)}")
    if missing:
        torch.set_num_threads(settings.threads)
        _measure(missing, results, settings)
    rows = list(results.rows.values())
    print(table(rows, results.baseline, settings))
    if arguments.plot:
        draw(rows, results.baseline, settings, arguments.plot)
    return int(any(results.rows[cell.name].error for cell in cells))


def _settings(arguments: argparse.Namespace) -> CompareSettings:
    dtype = choose_dtype(arguments.dtype, open_device(arguments.device))
    return CompareSettings(
        model=arguments.model,
        dtype=str(dtype).removeprefix("torch."),
        device=arguments.device,
        threads=arguments.threads,
        prompts=tuple(sorted(set(arguments.prompts))),
        goes_on=arguments.goes_on,
        texts=arguments.texts,
        talks=arguments.talks,
        document=arguments.document,
        workloads=tuple(dict.fromkeys(arguments.workloads)),
    )


def _check_plot(plot: Path | None) -> None:
    """Raises InvalidRequestError where it could not be drawn, which would be known only at the end."""
    if plot and (plot.suffix not in PICTURES or not plot.parent.is_dir()):
        raise InvalidRequestError(
            f"--plot is {plot}; its folder must be there, and its name end in {', '.join(PICTURES)}"
        )


def _measure(cells: list[Cell], results: Results, settings: CompareSettings) -> None:
    """Measures one by one, and says how long the rest takes."""
    comparison = Comparison(settings, say)
    say(f"measuring {len(cells)} cells, {cells[0].name} first")
    for number, cell in enumerate(cells, 1):
        began = time.perf_counter()
        try:
            row = comparison.measure(cell)
        except Exception as error:  # a policy's, which others have no part in
            policy, seconds = registry.POLICIES[cell.compression.policy], time.perf_counter() - began
            told = " ".join(f"{type(error).__name__}: {error}".split())
            row = Row(cell.name, policy.name, policy.version, {}, (), seconds, told)
        results.add(row)
        took = mean(each.seconds for each in results.rows.values())
        say(
            f"{number} of {len(cells)}, {cell.name}: {row.error or 'done'} after {row.seconds:.0f} s; "
            f"about {took * (len(cells) - number) / 60:.0f} minutes are left"
        )
