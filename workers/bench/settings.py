"""With what cells are measured; only what was measured with the same can be compared."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pyramidserve.errors import InvalidRequestError
from workers.bench.workload import named_workload

# What facts, questions and answers add to a document at most, a token a byte.
TALK_TOKENS = 1024
# Of a workload: what all prefills took, and output behind them.
PREFILL, DECODE = "prefill_seconds", "decode_tokens_per_second"


@dataclass(frozen=True)
class CompareSettings:
    """Sizes are in tokens.

    Attributes:
        model, dtype, device: as commands take them; ``dtype`` is never "auto".
        threads: that torch computes with.
        prompts: lengths of the prompts behind which text goes on, ascending.
        goes_on: what is read behind each.
        texts: of each length.
        talks: documents with facts that are asked for; 0: none.
        document: length of each.
        workloads: names as ``named_workload`` takes them; none: nothing is timed.
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
    workloads: tuple[str, ...]

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def numbers(self) -> tuple[str, ...]:
        """What is measured of a cell: of each prompt and workload."""
        return (
            *(f"{what}_{tokens}" for tokens in self.prompts for what in ("kept", "loss")),
            *(f"{name}_{what}" for name in self.workloads for what in (PREFILL, DECODE)),
        )

    @property
    def compared(self) -> tuple[str, ...]:
        """What follows from that, beside the baseline's."""
        facts = ("facts_kept", "facts_low", "facts_high") if self.talks else ()
        return (*(f"worse_{tokens}" for tokens in self.prompts), *facts)

    def others_of(self, text: str) -> str:
        """What differs in other settings, given as text, as in "talks 2, here 24"; "": nothing."""
        own: dict[str, Any] = json.loads(str(self))
        other = json.loads(text)
        return ", ".join(
            f"{name.replace('_', '-')} {_shown(other.get(name))}, here {_shown(value)}"
            for name, value in own.items()
            if other.get(name) != value
        )

    def __post_init__(self) -> None:
        """Raises InvalidRequestError where a number or a workload cannot be."""
        least = {"threads": 1, "goes_on": 1, "texts": 1, "talks": 0, "document": 1}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                option = f"--{name.replace('_', '-')}"
                raise InvalidRequestError(f"{option} is {getattr(self, name)}; it must be {fewest} or more")
        if min(self.prompts) < 1:
            raise InvalidRequestError(f"--prompts has {min(self.prompts)}; they must be 1 or more")
        for name in self.workloads:
            named_workload(name)

    def check_context(self, context: int) -> None:
        """Raises InvalidRequestError where a sequence may be longer than ``context``, the model's."""
        longest = self.prompts[-1]
        wanted = {f"--prompts {longest} and --goes-on {self.goes_on}": longest + self.goes_on}
        if self.talks:
            wanted[f"--document {self.document} with questions"] = self.document + TALK_TOKENS
        for name in self.workloads:
            workload = named_workload(name)
            wanted[f"--workloads {name}"] = workload.prompt + workload.output
        for what, tokens in wanted.items():
            if tokens > context:
                raise InvalidRequestError(
                    f"{what} take up to {tokens} tokens; the context of {self.model} is {context}: "
                    "give less"
                )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
