"""What was measured, in a folder: JSON from which the same command goes on, and CSV with a row a cell."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import BASELINE, Cell
from workers.bench.settings import QualitySettings
from workers.bench.summary import summary
from workers.whole_file import write_whole

JSON, CSV = "quality.json", "quality.csv"


@dataclass
class Row:
    """What is known of a cell.

    Attributes:
        method: its name without the share.
        policy, version: by which it was measured.
        token_share: bytes of a token beside those that it has in 16 bits.
        parts: what was found, by part.
        seconds: that each part took.
        errors: why a part could not be measured.
    """

    method: str
    policy: str
    version: str
    token_share: float
    parts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def error_of(self, parts: Collection[str]) -> str:
        """The first one of these parts; "" where there is none."""
        return next((error for part, error in self.errors.items() if part in parts), "")


class Results:
    """Rows in the order in which they were begun.

    Attributes:
        rows: by the names of their cells.
    """

    def __init__(
        self, settings: QualitySettings, versions: Mapping[str, str], folder: Path | None = None
    ) -> None:
        """Reads what is in ``folder``, if it is given and there; else makes it.

        Raises InvalidRequestError where it cannot be read or written, or was measured with other settings
        or other ``versions`` of policies.
        """
        self._settings, self._versions, self._folder = settings, versions, folder
        self.rows: dict[str, Row] = {}
        if folder and (folder / JSON).exists():
            self.rows = self._read(folder / JSON)
        self._write()

    def missing(self, cells: Sequence[Cell], parts: Sequence[str]) -> dict[Cell, list[str]]:
        """Of those of ``cells`` that lack any the parts that are not there, or failed."""
        lacks = {cell: [part for part in parts if not self.found(cell.name, part)] for cell in cells}
        return {cell: lacking for cell, lacking in lacks.items() if lacking}

    def found(self, name: str, part: str) -> Any:
        """What is known of a part of the cell of a name; None where nothing is."""
        row = self.rows.get(name)
        return row and row.parts.get(part)

    def add(self, name: str, row: Row, part: str, found: Any, seconds: float) -> None:
        """Takes a part of a cell, whose row is ``row`` where there is none yet, and writes all."""
        known = self.rows.setdefault(name, row)
        known.parts[part] = found
        known.seconds[part] = round(seconds, 2)
        known.errors.pop(part, None)
        self._write()

    def fail(self, name: str, row: Row, part: str, error: str) -> None:
        """Takes down why a part could not be measured, and writes all."""
        self.rows.setdefault(name, row).errors[part] = error
        self._write()

    def summaries(self) -> dict[str, dict[str, float]]:
        """The numbers of all cells, beside the baseline's."""
        baseline = self.rows.get(BASELINE.name)
        full = baseline.parts if baseline else {}
        return {name: summary(row.parts, full, row.token_share) for name, row in self.rows.items()}

    def _read(self, file: Path) -> dict[str, Row]:
        try:
            told = json.loads(file.read_text())
            other = self._settings.others_of(told["settings"])
            rows = {name: Row(**row) for name, row in told["cells"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequestError(
                f"{file} is none that `bench quality` wrote ({error!r}); give another folder"
            ) from error
        if other:
            raise InvalidRequestError(
                f"{file} was measured with {other}; give another folder, or what it was measured with"
            )
        for row in rows.values():
            here = self._versions.get(row.policy, row.version)
            if here != row.version:
                raise InvalidRequestError(
                    f"{file} has policy {row.policy!r} in version {row.version}, here it is {here}; "
                    "give another folder"
                )
        return rows

    def _write(self) -> None:
        if self._folder is None:
            return
        settings = json.dumps(asdict(self._settings))
        cells = (f"{json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in self.rows.items())
        lines = ",\n".join(cells)
        told = f'{{"settings": {settings},\n"cells": {{\n{lines}\n}}}}\n'
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / JSON, told)
            write_whole(self._folder / CSV, self._table())
        except OSError as error:
            raise InvalidRequestError(
                f"{self._folder} cannot be written: {error}; give another folder"
            ) from error

    def _table(self) -> str:
        summaries = self.summaries()
        numbers = dict.fromkeys(name for each in summaries.values() for name in each)
        text = io.StringIO()
        writer = csv.DictWriter(text, ["cell", "policy", "version", "error", *numbers, "seconds"])
        writer.writeheader()
        for name, row in self.rows.items():
            writer.writerow(
                {
                    "cell": name,
                    "policy": row.policy,
                    "version": row.version,
                    "error": row.error_of(row.errors),
                    **{column: f"{number:.6g}" for column, number in summaries[name].items()},
                    "seconds": f"{sum(row.seconds.values()):.0f}",
                }
            )
        return text.getvalue()
