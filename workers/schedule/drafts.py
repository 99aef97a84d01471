"""How many tokens to generate ahead of their verification. Pure."""

from dataclasses import dataclass

from workers.schedule.tuning import ScheduleTuning


@dataclass
class Drafting:
    """Adapts to how many drafts turn out right.

    Attributes:
        most: drafts ahead of a verification, at most.
        tuning: what verifications cost, and how fast it adapts.
        drafted, accepted: drafts verified so far, and those of them that were right.
    """

    most: int
    tuning: ScheduleTuning = ScheduleTuning()
    drafted: int = 0
    accepted: int = 0
    _right: float = 0.8

    @property
    def ahead(self) -> int:
        """Drafts that bring the most tokens for their cost, if each is as likely right as lately."""

        def pace(drafts: int) -> float:
            tokens = sum(self._right**index for index in range(drafts + 1))
            return tokens / (drafts + self.tuning.verification_steps)

        return max(range(1, self.most + 1), key=pace)

    def verified(self, drafts: int, right: int) -> None:
        """Takes note that of ``drafts`` drafts the first ``right`` were right."""
        self.drafted += drafts
        self.accepted += right
        # Behind the first wrong one nothing is learnt.
        for hit in [True] * right + [False] * (right < drafts):
            self._right += self.tuning.newest_verification / 2 * (hit - self._right)
