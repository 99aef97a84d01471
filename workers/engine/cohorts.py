"""Sequences that were waiting together, and begin to decode together. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field


@dataclass
class _Cohort:
    """``left`` have no output yet; ``resting`` have, and wait."""

    left: set[int]
    resting: list[int] = field(default_factory=list)


class Cohorts:
    """Who may decode while others of its cohort have no output yet.

    To decode the first few of a burst at full speed would hold up the prefills of the others, and a step
    for a few costs nearly as much as one for all. So until all of a cohort have their first output, those
    that have it rest, and decode once behind each of its prefills.
    """

    def __init__(self) -> None:
        self._of: dict[int, _Cohort] = {}

    def form(self, keys: Collection[int]) -> None:
        """Makes ``keys``, which wait for their prefills, a cohort."""
        self._of |= dict.fromkeys(keys, _Cohort(set(keys)))

    def __contains__(self, key: int) -> bool:
        return key in self._of

    def same(self, one: int, other: int) -> bool:
        """Whether both are of one cohort."""
        return self._of[one] is self._of.get(other)

    def rests(self, key: int) -> bool:
        """Whether ``key`` has output and waits for others."""
        return key in self._of and key in self._of[key].resting

    def prefilled(self, keys: Sequence[int], going_on: Sequence[int]) -> list[int]:
        """Notes that ``keys`` of one cohort have their first output; ``going_on`` are to have more.

        Returns who may decode now.
        """
        cohort = self._of[keys[0]]
        cohort.left -= set(keys)
        cohort.resting += going_on
        for key in set(keys) - set(going_on):
            del self._of[key]
        return self._wake(cohort)

    def rest(self, key: int) -> bool:
        """Lets ``key``, which has decoded, rest if it has to; returns whether it does."""
        cohort = self._of.get(key)
        if cohort is None:
            return False
        if not cohort.left:
            del self._of[key]
            return False
        cohort.resting.append(key)
        return True

    def remove(self, key: int) -> list[int]:
        """Forgets ``key``, if it is here. Returns who need not wait any more."""
        cohort = self._of.pop(key, None)
        if cohort is None:
            return []
        cohort.left.discard(key)
        if key in cohort.resting:
            cohort.resting.remove(key)
        return [] if cohort.left else self._wake(cohort)

    @staticmethod
    def _wake(cohort: _Cohort) -> list[int]:
        awake, cohort.resting = cohort.resting, []
        return awake
