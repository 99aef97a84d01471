"""What policies leave of what prompts win, for ``auto`` to choose by."""

from collections.abc import Sequence
from dataclasses import replace

from pyramidserve.types import Compression
from workers.bench.cell import BASELINE, Cell, Holding
from workers.bench.facts import Asking, Talk
from workers.bench.intervals import helped, share
from workers.bench.layers import LayerLosses
from workers.bench.parts.facts import Facts
from workers.budget.kv_share import KVShare
from workers.engine.engine import Engine
from workers.policies.budget import Trial


class Trials:
    """Tries policies with the same texts and questions, of which the full cache is asked once."""

    def __init__(self, engine: Engine, losses: LayerLosses, held: Sequence[Talk], tokens: int) -> None:
        """``losses`` are behind texts, ``held`` about documents of ``tokens`` tokens."""
        self._losses, self._facts, self._asking = losses, Facts(held, tokens), Asking(engine)
        self._whole = losses.of_all()
        self._facts.begin(self._asking)
        self._gains = self._gained(BASELINE)

    def measure(self, policy: Compression, kept: float) -> Trial:
        """What ``policy`` leaves, which does not say how much stays, where ``kept`` of the tokens do."""
        text = 1 - self._losses.of(replace(policy, kv_keep=kept)) / self._whole
        gains = self._gained(Cell(policy, share=kept))
        pairs = helped(zip(gains, self._gains, strict=True))
        facts = share(pairs).value if pairs else None
        return Trial(
            *(kept, policy.policy, policy.prefill, tuple(dict(policy.parameters).items())),
            text=round(text, 4),
            facts=None if facts is None else round(facts, 4),
        )

    def _gained(self, cell: Cell) -> list[float]:
        """By how many nats documents make answers likelier; the share of ``cell`` is one of tokens."""
        holding = Holding(cell, KVShare(token=1.0))
        gains: list[float] = self._facts.measure(self._asking, holding, None, lambda tokens: None)["gains"]
        return gains
