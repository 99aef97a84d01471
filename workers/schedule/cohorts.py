"""Sequences that come at about the same time, and begin to decode together. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from workers.budget.pages import IntegrityError
from workers.schedule.phase import Phase

WITHOUT_OUTPUT = {Phase.WAITING, Phase.PREFILLING}
WITH_OUTPUT = {Phase.RESTING, Phase.READY, Phase.DECODING}


@dataclass(eq=False)
class _Cohort:
    """Sequences that begin to decode together; others may join while it is ``open``.

    Attributes:
        without_output: those that the others wait for.
        resting: those that have output, and wait.
        members: all that have ever belonged to it.
        begun: one of them has output.
    """

    without_output: set[int] = field(default_factory=set)
    resting: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    open: bool = True
    begun: bool = False


class Cohorts:
    """Who may decode while others of its cohort have no output yet.

    To decode the first few of a burst at full speed would hold up the prefills of the others, and a step
    for a few costs nearly as much as one for all. So until all of a cohort have their first output, those
    that have it rest, and decode once behind each of its prefills. As the requests of a burst come one
    behind the other, a cohort is open until the first of it have their output.
    """

    def __init__(self) -> None:
        self._cohort_of: dict[int, _Cohort] = {}
        self._newest = _Cohort(open=False)

    @property
    def open(self) -> Sequence[int]:
        """All that ever belonged to the cohort that is open, if one is."""
        return self._newest.members if self._newest.open else ()

    @property
    def closing(self) -> bool:
        """Whether the open cohort has output, so that it is time to close it."""
        return self._newest.open and self._newest.begun

    def close(self) -> None:
        """Lets nobody else join the cohort that is open."""
        self._newest.open = False

    def form(self, keys: Collection[int]) -> None:
        """Adds ``keys``, which wait for their prefills, to the open cohort, or to one that opens now."""
        if not self._newest.open:
            self._newest = _Cohort()
        self._newest.without_output |= set(keys)
        self._newest.members += keys
        self._cohort_of |= dict.fromkeys(keys, self._newest)

    def __contains__(self, key: int) -> bool:
        return key in self._cohort_of

    def same(self, member: int, key: int) -> bool:
        """Whether ``key`` is of the cohort of ``member``."""
        return self._cohort_of[member] is self._cohort_of.get(key)

    @property
    def resting(self) -> list[int]:
        """All that have output and wait for others."""
        return [key for cohort in dict.fromkeys(self._cohort_of.values()) for key in cohort.resting]

    def prefilled(self, keys: Sequence[int], going_on: Sequence[int]) -> list[int]:
        """Notes that ``keys`` of one cohort have their first output; ``going_on`` are to have more.

        Returns who may decode now.
        """
        cohort = self._cohort_of[keys[0]]
        cohort.begun = True
        cohort.without_output -= set(keys)
        cohort.resting += going_on
        for key in set(keys) - set(going_on):
            del self._cohort_of[key]
        return self._wake(cohort)

    def rest(self, key: int) -> bool:
        """Lets ``key``, which has decoded, rest if it has to; returns whether it does."""
        cohort = self._cohort_of.get(key)
        if cohort is None:
            return False
        if not cohort.without_output:
            del self._cohort_of[key]
            return False
        cohort.resting.append(key)
        return True

    def remove(self, key: int) -> list[int]:
        """Forgets ``key``, if it is here. Returns who need not wait any more."""
        cohort = self._cohort_of.pop(key, None)
        if cohort is None:
            return []
        cohort.without_output.discard(key)
        if key in cohort.resting:
            cohort.resting.remove(key)
        return [] if cohort.without_output else self._wake(cohort)

    def check_integrity(self, phases: Mapping[int, Phase]) -> None:
        """Raises IntegrityError unless the cohorts fit the ``phases`` of all sequences."""
        for key, cohort in self._cohort_of.items():
            phase = phases.get(key)
            if phase not in (WITHOUT_OUTPUT if key in cohort.without_output else WITH_OUTPUT):
                raise IntegrityError(f"sequence {key} has a cohort, but its phase is {phase}")
        for cohort in dict.fromkeys(self._cohort_of.values()):
            if cohort.resting and not cohort.without_output:
                raise IntegrityError(f"{cohort.resting} rest, but wait for nobody")
            if unknown := cohort.without_output - self._cohort_of.keys():
                raise IntegrityError(f"{unknown} are waited for, but have no cohort")

    @staticmethod
    def _wake(cohort: _Cohort) -> list[int]:
        awake, cohort.resting = cohort.resting, []
        return awake
