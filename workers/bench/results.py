"""A CSV file of what was measured, a row a cell: what is there is not measured again."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import BASELINE, Cell
from workers.bench.facts import LEAST_GAIN, recovered
from workers.bench.settings import CompareSettings
from workers.whole_file import write_whole

# Behind these come the numbers, by ``CompareSettings.numbers`` and ``compared``.
FIRST, LAST = ("cell", "policy", "version", "error"), ("seconds", "answer_gains", "settings")
SEED = 1


@dataclass(frozen=True)
class Row:
    """What was measured of a cell, or why it could not be.

    Attributes:
        numbers: by the names of their columns.
        gains: of each question, nats by which the document makes the right answer likelier.
        seconds: that it took.
    """

    cell: str
    policy: str
    version: str
    numbers: Mapping[str, float]
    gains: tuple[float, ...]
    seconds: float
    error: str = ""


def compared(row: Row, baseline: Row | None) -> dict[str, float]:
    """What a row is beside the baseline's: how much worse its losses are, and its share of the facts' gain.

    The share is over all questions where the document helps the baseline, with a 95 % interval.
    """
    if baseline is None or row.error or baseline.error:
        return {}
    told = {
        name.replace("loss", "worse"): row.numbers[name] / loss - 1
        for name, loss in baseline.numbers.items()
        if name.startswith("loss_")
    }
    pairs = [each for each in zip(baseline.gains, row.gains, strict=True) if each[0] >= LEAST_GAIN]
    if pairs:
        share, low, high = recovered(pairs, SEED)
        told |= {"facts_kept": share, "facts_low": low, "facts_high": high}
    return told


class Results:
    """Rows in the order in which they were measured, and their file.

    Attributes:
        rows: by the names of their cells.
    """

    def __init__(
        self, settings: CompareSettings, versions: Mapping[str, str], file: Path | None = None
    ) -> None:
        """Reads what is in ``file``, if it is given and there.

        Raises InvalidRequestError where it cannot be read or written, or was measured with other settings
        or other ``versions`` of policies.
        """
        self._settings, self._versions, self._file = settings, versions, file
        self.rows: dict[str, Row] = {}
        if file and file.exists():
            self.rows = {row.cell: row for row in self._read(file)}
        self._write()

    @property
    def baseline(self) -> Row | None:
        """What the others are compared with."""
        return self.rows.get(BASELINE.name)

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of ``cells`` that are not there, or failed."""
        return [cell for cell in cells if cell.name not in self.rows or self.rows[cell.name].error]

    def add(self, row: Row) -> None:
        """Takes a row, in the place of one that failed, and writes all."""
        self.rows.pop(row.cell, None)
        self.rows[row.cell] = self._row(self._line(row))  # as it is read again
        self._write()

    def _read(self, file: Path) -> Iterable[Row]:
        try:
            with file.open(newline="") as text:
                reader = csv.DictReader(text)
                lines = list(reader)
            if not set(FIRST) <= set(reader.fieldnames or ()):
                raise ValueError("it has other columns")
            for line in lines:
                self._check(file, line)
            return [self._row(line) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise InvalidRequestError(
                f"{file} is none that `bench policies` wrote ({error!r}); give another file"
            ) from error

    def _check(self, file: Path, line: Mapping[str, str]) -> None:
        other = self._settings.others_of(line["settings"])
        if other:
            raise InvalidRequestError(
                f"{file} was measured with {other}; give another file, or what it was measured with"
            )
        here = self._versions.get(line["policy"], line["version"])
        if here != line["version"]:
            raise InvalidRequestError(
                f"{file} has policy {line['policy']!r} in version {line['version']}, here it is {here}; "
                "give another file"
            )

    def _row(self, line: Mapping[str, str]) -> Row:
        numbers = {name: float(line[name]) for name in self._settings.numbers if line.get(name)}
        return Row(
            line["cell"],
            line["policy"],
            line["version"],
            numbers,
            tuple(map(float, line["answer_gains"].split())),
            float(line["seconds"]),
            line["error"],
        )

    def _write(self) -> None:
        if self._file is None:
            return
        columns = [*FIRST, *self._settings.numbers, *self._settings.compared, *LAST]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(map(self._line, self.rows.values()))
        try:
            write_whole(self._file, text.getvalue())
        except OSError as error:
            raise InvalidRequestError(
                f"{self._file} cannot be written: {error}; give another file"
            ) from error

    def _line(self, row: Row) -> dict[str, str]:
        numbers = {**row.numbers, **compared(row, self.baseline), "seconds": row.seconds}
        return {
            "cell": row.cell,
            "policy": row.policy,
            "version": row.version,
            "error": row.error,
            **{name: f"{number:.6g}" for name, number in numbers.items()},
            "answer_gains": " ".join(f"{gain:.4f}" for gain in row.gains),
            "settings": str(self._settings),
        }
