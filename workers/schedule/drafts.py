"""How many tokens to generate ahead of their verification. Pure."""

from dataclasses import dataclass

# Share of the newest verification in what is known of acceptance.
NEWEST = 0.2
# What a verification costs, in draft steps.
VERIFICATION = 2.0


@dataclass
class Drafting:
    """Adapts to how many drafts turn out right.

    Attributes:
        most: drafts ahead of a verification, at most.
        drafted, accepted: drafts verified so far, and those of them that were right.
    """

    most: int
    drafted: int = 0
    accepted: int = 0
    _right: float = 0.8

    @property
    def ahead(self) -> int:
        """Drafts that bring the most tokens for their cost, if each is as likely right as lately."""

        def pace(drafts: int) -> float:
            tokens = sum(self._right**index for index in range(drafts + 1))
            return tokens / (drafts + VERIFICATION)

        return max(range(1, self.most + 1), key=pace)

    def verified(self, drafts: int, right: int) -> None:
        """Takes note that of ``drafts`` drafts the first ``right`` were right."""
        self.drafted += drafts
        self.accepted += right
        # Behind the first wrong one nothing is learnt.
        for hit in [True] * right + [False] * (right < drafts):
            self._right += NEWEST / 2 * (hit - self._right)
