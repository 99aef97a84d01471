"""A sequence that a simulated pipeline runs. Pure."""

from dataclasses import dataclass

from cluster.simulation.turn import SimulatedTurn
from workers.budget.forecast import Growth
from workers.budget.plan import KeepPlan


@dataclass(eq=False)
class SimulatedSequence:
    """A turn that has come to a pipeline; its pages are those of all stages together.

    Attributes:
        growth: pages of each stage.
        joined: the round at which ``done`` output tokens were fed, and it began to decode.
    """

    number: int
    turn: SimulatedTurn
    plan: KeepPlan
    growth: Growth
    joined: float = 0.0
    done: float = 0.0

    def __post_init__(self) -> None:
        self.first_pages = sum(self.growth.first)
        self.slope = (sum(self.growth.most) - self.first_pages) / max(1, self.growth.most_tokens)

    @property
    def end(self) -> float:
        """The round with which it ends."""
        return self.joined + self.turn.answer_tokens - 1 - self.done

    @property
    def pages(self) -> float:
        """What it holds with ``done`` tokens fed."""
        return self.first_pages + self.slope * self.done
