"""With what cells are measured; only what was measured with the same can be compared."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyramidserve.errors import InvalidRequestError
from workers.bench.workload import named_workload

# Of a workload: what all prefills took, and output behind them.
PREFILL, DECODE = "prefill_seconds", "decode_tokens_per_second"


@dataclass(frozen=True)
class QualitySettings:
    """Sizes are in tokens.

    Attributes:
        model, dtype, device: as commands take them; ``dtype`` is never "auto".
        threads: that torch computes with.
        prompts: lengths of the prompts behind which text goes on, ascending.
        goes_on: what is read behind each.
        texts: of each length.
        talks: documents with facts that are asked for later.
        document: length of each.
        task_prompts: lengths of the prompts of tasks, ascending.
        tasks: of each kind and length.
        workloads: names as ``named_workload`` takes them.
    """

    model: str
    dtype: str
    device: str
    threads: int
    prompts: tuple[int, ...]
    goes_on: int
    texts: int
    talks: int
    document: int
    task_prompts: tuple[int, ...]
    tasks: int
    workloads: tuple[str, ...]

    def others_of(self, other: Mapping[str, Any]) -> str:
        """What differs in other settings, as JSON has them, as in "talks 2, here 24"; "": nothing."""
        own: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return ", ".join(
            f"{_option(name)[2:]} {_shown(other.get(name))}, here {_shown(value)}"
            for name, value in own.items()
            if other.get(name) != value
        )

    def __post_init__(self) -> None:
        """Raises InvalidRequestError where a number or a workload cannot be."""
        for name in ("threads", "goes_on", "texts", "talks", "document", "tasks"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{_option(name)} is {getattr(self, name)}; it must be 1 or more")
        for name in ("prompts", "task_prompts"):
            if min(getattr(self, name)) < 1:
                raise InvalidRequestError(
                    f"{_option(name)} has {min(getattr(self, name))}; they must be 1 or more"
                )
        for name in self.workloads:
            named_workload(name)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
