"""What every section of the check is given: a device, sizes, the time left, and where results go."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Section = Callable[["Context", dict[str, Any]], None]


class OutOfTimeError(Exception):
    """The time is up; what has been measured stays."""


@dataclass
class Context:
    """One run of the check.

    Attributes:
        tiny: sizes that a CPU does in seconds.
        ends: when the time is up, on ``time.monotonic``'s clock.
        results: by section; written to ``out`` whenever ``flush`` is called.
    """

    device: torch.device
    tiny: bool
    ends: float
    out: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.ends - time.monotonic()

    def check_time(self) -> None:
        """Raises OutOfTimeError if the time is up."""
        if self.left <= 0:
            raise OutOfTimeError

    def flush(self) -> None:
        """Writes what there is, so that a run that is cut off leaves it."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def run(self, name: str, section: Section) -> None:
        """Runs a section, unless the time is up; what goes wrong is its result and stops no other."""
        results: dict[str, Any] = {}
        self.results[name] = results
        began = time.monotonic()
        if self.left <= 0:
            results["skipped"] = "the time was up"
        else:
            try:
                section(self, results)
            except OutOfTimeError:
                results["cut_short"] = "the time was up"
            except Exception as error:
                results["error"] = f"{type(error).__name__}: {error}"
                results["traceback"] = traceback.format_exc().splitlines()[-12:]
        results["seconds"] = round(time.monotonic() - began, 2)
        self.flush()
        free(self.device)


def free(device: torch.device) -> None:
    """Gives memory that nobody uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
