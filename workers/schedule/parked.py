"""Sessions between two turns: whose KV waits on the shards for the next. Pure."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from pyramidserve.types import Compression
from workers.budget.plan import KeepPlan
from workers.policies.registry import prunes
from workers.policies.settled import alike
from workers.schedule.sequence import RunningSequence, SequenceRequest


@dataclass
class ParkedSession:
    """What the last turn of a session left.

    Attributes:
        key: the turn's sequence, which names the KV on the shards.
        ids: the tokens whose KV it is; the first ``prompt_tokens`` were the turn's prompt.
        generated: how many of them were generated in it.
        length: the most that they could be, which their rotation may hang on.
        whole: nothing of it has been dropped from the host.
        shared: newest of ``ids`` that all heads have on the device, so that they can be taken back.
        since: when the turn ended, in seconds.
        lacking_rows: rows, summed over layers, that ``prune`` dropped, for the next turn to lift.
        recomputed_rows: rows, summed over layers, that were prefilled again in place of that.
        on_host: it is suspended, so that it takes no pages of the device.
    """

    key: int
    session_id: str
    ids: tuple[int, ...]
    prompt_tokens: int
    compression: Compression
    whole: bool
    since: float
    shared: int
    length: int = 0
    lacking_rows: int = 0
    recomputed_rows: int = 0
    on_host: bool = False

    @classmethod
    def of(cls, sequence: RunningSequence, whole: bool, on_host: bool) -> "ParkedSession":
        """What a sequence leaves that has ended, or was cancelled: all that its KV is verified of.

        Args:
            whole: none of its KV was dropped.
            on_host: it had made room for others.
        """
        request = sequence.request
        return cls(
            key=request.sequence,
            session_id=request.session_id,
            ids=(*request.prompt_ids, *sequence.output_ids[: sequence.fed]),
            prompt_tokens=len(request.prompt_ids),
            compression=request.compression,
            whole=whole and sequence.whole,
            since=sequence.token_times[-1],
            shared=sequence.plan.shared(len(request.prompt_ids) - sequence.reused, sequence.fed),
            length=sequence.length,
            lacking_rows=_lacking_rows(sequence.plan, sequence.reused),
            recomputed_rows=sequence.recomputed_rows,
            on_host=on_host,
        )

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def reusable(self, request: SequenceRequest) -> int:
        """How many of the prompt's first tokens need not be computed for ``request``.

        All that it has in common with ``ids`` but the prompt's last token, whose output is wanted. What
        ``prune`` has chosen holds for the prompt that it was chosen for, so that only what was generated
        can be taken back; other policies need all KV for that, on the device or the host. Where heads have
        tokens of their own, only what all of them have on the device can be.
        """
        if not alike(request.compression, self.compression):
            return 0
        prompt = request.prompt_ids[:-1]
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        differing = (index for index, (parked, asked) in pairs if parked != asked)
        common = next(differing, min(len(self.ids), len(prompt)))
        if len(self.ids) - common > self.shared:
            return 0
        if common >= self.prompt_tokens:
            return common
        return common if self.whole and not prunes(self.compression) else 0

    def lifting_pays(self, again: KeepPlan, lifted_row: float) -> bool:
        """Whether the next turn, which would be prefilled as ``again``, lifts what this one lacks.

        That takes the rows that it lacks, each ``lifted_row`` times as long as one that is prefilled, but
        once: so it pays as soon as as much has been spent on prefilling turns again.
        """
        return self.recomputed_rows + sum(again.kept) > lifted_row * self.lacking_rows


def _lacking_rows(plan: KeepPlan, reused: int) -> int:
    """Rows, summed over layers, that a turn drops of its prompt but for the first ``reused``."""
    if not plan.spills_hidden:
        return 0
    return sum(plan.prompt_tokens - max(kept, reused) for kept in plan.kept)


class ParkedSessions:
    """Parked sessions by name, the least recently used first.

    Attributes:
        limit: how many there may be.
        discarded: keys of those that are given up, whose KV is to be released.
    """

    def __init__(self, limit: int) -> None:
        """For at most ``limit`` of them."""
        self.limit = limit
        self._sessions: OrderedDict[str, ParkedSession] = OrderedDict()
        self.discarded: list[int] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ParkedSession]:
        return iter(list(self._sessions.values()))

    def get(self, session_id: str) -> ParkedSession | None:
        """The session, if it is parked."""
        return self._sessions.get(session_id)

    def add(self, session: ParkedSession) -> None:
        """Parks a session; its last turn, or the oldest session, is given up for it."""
        self.discard(session.session_id)
        self._sessions[session.session_id] = session
        while len(self._sessions) > self.limit:
            self.discard(next(iter(self._sessions)))

    def discard(self, session_id: str) -> None:
        """Gives up what the session has parked, if anything."""
        if session_id in self._sessions:
            self.discarded.append(self.remove(session_id).key)

    def remove(self, session_id: str) -> ParkedSession:
        """Takes a session out, whose KV goes to its next turn."""
        return self._sessions.pop(session_id)

    def oldest(self, on_host: bool, spared: ParkedSession | None = None) -> ParkedSession | None:
        """The least recently used one that is, or is not, on the host, and is not ``spared``."""
        sessions = self._sessions.values()
        return next((each for each in sessions if each.on_host == on_host and each is not spared), None)
