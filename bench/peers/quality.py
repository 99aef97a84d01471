"""Has kvpress and transformers read what `bench quality` reads, and adds them to its results."""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from bench.peers.compare import HOME, INSTALL, ROOT
from bench.peers.reading import Passage, Reading, ReadingJob
from cluster.commands.bench_quality import PICTURE
from cluster.commands.progress import Progress
from cluster.commands.quality_plot import draw
from cluster.commands.quality_table import table
from cluster.commands.serve import say
from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import BASELINE, SHARES
from workers.bench.parts.facts import Facts
from workers.bench.parts.part import Record
from workers.bench.parts.passages import Passages, passages_record
from workers.bench.parts.tasks import SEEN, UNSEEN, Tasks
from workers.bench.quality import Quality
from workers.bench.results import JSON, Results, Row
from workers.bench.settings import QualitySettings
from workers.model.checkpoint import resolve_checkpoint
from workers.policies.registry import versions

PYTHON = HOME / "kvpress" / "bin" / "python"
# Of kvpress, at each share; of transformers, of all tokens.
PRESSES = ("kvzip", "snapkv, criticaladakv", "expected_attention, adakv")
QUANTISED = ("int4", "int2")
OTHER_PRESSES = ("kvzip+", "snapkv", "snapkv, adakv")
VERSION = "kvpress 0.5.5, transformers 5.2.0"
PARTS = ("loss", "facts", "tasks", "humaneval")
FACTS = "facts"


def main() -> None:
    """Measures what is not yet there, part by part."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.quality", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="as `bench quality` has it"
    )
    parser.add_argument("--methods", nargs="+", default=[*PRESSES, *QUANTISED],
                        choices=[*PRESSES, *OTHER_PRESSES, *QUANTISED])  # fmt: skip
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the bytes in 16 bits")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit(f"kvpress is not installed; run {INSTALL} kvpress")
    settings = read_settings(arguments.out / JSON)
    results = Results(settings, versions(), arguments.out)
    parts = [part for part in arguments.parts if results.found(BASELINE.name, part)]
    quality = Quality(settings, parts, say)
    for method, share in ways(arguments.methods, arguments.shares):
        row = row_of(method)
        name = row.method if share is None else f"{row.method}@{share:g}"
        for part in (part for part in quality.parts if not results.found(name, part)):
            say(f"{name}: {part}")
            began, made = time.perf_counter(), quality.made[part]
            assert isinstance(made, Passages | Facts | Tasks)
            sets = passages(made)
            every = [each for some in sets.values() for each in some]
            try:
                read = readings(settings, method, 1.0 if share is None else share, every)
            except RuntimeError as error:
                results.fail(name, row, part, str(error))
                continue
            found = record(made, sets, read, results.found(BASELINE.name, part))
            results.add(name, row, part, found, time.perf_counter() - began)
    print(table(results))
    draw(results, arguments.out / PICTURE)


def read_settings(file: Path) -> QualitySettings:
    """With what the results there were measured. Raises InvalidRequestError where there are none."""
    try:
        told = json.loads(file.read_text())["settings"]
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        return QualitySettings(**{**told, **lists})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"{file} is none that `bench quality` wrote ({error!r}); measure there first"
        ) from error


def ways(methods: Sequence[str], shares: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    """Each method at each share; what holds all tokens once."""
    for method in methods:
        yield from ((method, share) for share in ((None,) if method in QUANTISED else shares))


def row_of(method: str) -> Row:
    """A row in which ``kept`` is of bytes."""
    program = "transformers" if method in QUANTISED else "kvpress"
    return Row(f"{program} {method}", program, VERSION, 1.0)


def passages(part: Passages | Facts | Tasks) -> dict[str, list[Passage]]:
    """What is read of a part, set by set."""
    if isinstance(part, Passages):
        return {
            name: [Passage(list(each.prompt_ids), [], list(each.output_ids)) for each in own]
            for name, own in part.sets.items()
        }
    if isinstance(part, Facts):
        # The first turn's prompt is compressed, and what is said from then on stays whole.
        return {FACTS: [Passage(talk.prompt_ids, *talk.at_once()[:2]) for talk in part.begun]}
    seen = [Passage(list(item.prompt_ids), [], list(item.answer_ids)) for item in part.items]
    unseen = [
        Passage(
            list(item.prompt_ids[: item.context_tokens]),
            list(item.prompt_ids[item.context_tokens :]),
            list(item.answer_ids),
        )
        for item in part.items
    ]
    return {SEEN: seen, UNSEEN: unseen}


def record(
    part: Passages | Facts | Tasks,
    sets: Mapping[str, Sequence[Passage]],
    read: Sequence[Reading],
    full: Record,
) -> Record:
    """What was found, as `bench quality` has it; ``read`` is of all sets, one behind the other."""
    if isinstance(part, Facts):
        likely = [
            sum(each.log_probabilities[place])
            for each, talk in zip(read, part.begun, strict=True)
            for place in talk.at_once()[2]
        ]
        return part.record(likely, mean(each.kept for each in read))
    found, rest = {}, iter(read)
    for name, own in sets.items():
        some = [next(rest) for _ in own]
        found[name] = part.record(some) if isinstance(part, Tasks) else passages_record(some, full[name])
    return found


def readings(
    settings: QualitySettings, method: str, share: float, every: Sequence[Passage]
) -> list[Reading]:
    """Has a process of the peer read all passages. Raises RuntimeError with its last words."""
    model = str(resolve_checkpoint(settings.model))
    job = ReadingJob(model, settings.dtype, settings.threads, method, share, list(every))
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    progress, read = Progress(sum(len(each.context) for each in every)), []
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        tempfile.TemporaryFile("w+") as errors,
    ):
        json.dump(asdict(job), file)
        file.flush()
        command = [str(PYTHON), "-m", "bench.peers.kvpress_peer", file.name]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as peer:
            assert peer.stdout
            for passage, line in zip(every, peer.stdout, strict=False):
                read.append(Reading(**json.loads(line)))
                progress(len(passage.context), method)
        progress.clear()
        if peer.returncode or len(read) < len(every):
            errors.seek(0)
            raise RuntimeError(f"exit code {peer.returncode}: {' '.join(errors.read()[-500:].split())}")
    return read


if __name__ == "__main__":
    main()
