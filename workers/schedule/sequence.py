"""One sequence as the head of a pipeline sees it, from its request to its end. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pyramidserve.types import Compression, Constraint, FinishReason, Sampling, Stopping
from workers.budget.plan import KeepPlan
from workers.budget.span import Span
from workers.schedule.detokenizer import Detokenizer
from workers.schedule.drafts import Drafting
from workers.schedule.phase import Phase
from workers.tools.reader import CallSyntax, Said, ToolReader


@dataclass(frozen=True)
class SequenceRequest:
    """A validated request; ``sampling.seed`` and ``stopping.max_tokens`` are set.

    ``forced_output_ids`` are taken as output before sampling begins; but for the last ``untold`` of them,
    which are given output that nothing ends, they are not reported again.
    ``expected_tokens``: how long its output will probably be; 0: as long as it may be.
    ``session_id``: whose turn it is; empty: nobody's.
    ``instructions``: of the prompt, in order, where a floor keeps some of them.
    """

    sequence: int
    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    compression: Compression
    forced_output_ids: tuple[int, ...] = ()
    trace: bool = False
    expected_tokens: int = 0
    session_id: str = ""
    untold: int = 0
    constraint: Constraint | None = None
    calls: CallSyntax | None = None
    instructions: tuple[Span, ...] = ()

    @property
    def max_tokens(self) -> int:
        assert self.stopping.max_tokens is not None
        return self.stopping.max_tokens

    @property
    def length(self) -> int:
        """The most tokens of its KV: all but the last output, which is never fed."""
        return len(self.prompt_ids) + self.max_tokens - 1


@dataclass
class RunningSequence:
    """An admitted sequence.

    Attributes:
        phase: what it waits for, or what its step does; ``Roster.move`` changes it.
        reached: outputs that its KV is of or that are next to be fed; fewer than ``output_ids`` while it is
            replayed after it has lost its KV.
        preemptions: how often it had to make room for others.
        reused: prompt tokens whose KV an earlier turn of the session left.
        whole: nothing of that had been dropped from the host.
        recomputed_rows: see ``ParkedSession``.
        drafts: outputs that are to be verified next.
        drafting: how many there are to be; None where outputs are not drafted.
        broken: why nothing follows: its logits were not finite, or what its policy did; "": it may go on.
        overfed: a step fed known output behind where it ended, which none may go on from.
        session_ended: its session was ended since it came, so that what it leaves is nobody's.
        banned: ids that are not drawn before its ``min_tokens``.
        reader: tells calls of tools from text; None: there are none.
    """

    request: SequenceRequest
    plan: KeepPlan
    detokenizer: Detokenizer
    started: float
    phase: Phase = Phase.WAITING
    output_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    reached: int = 0
    preemptions: int = 0
    reused: int = 0
    whole: bool = True
    recomputed_rows: int = 0
    drafts: list[int] = field(default_factory=list)
    drafting: Drafting | None = None
    finish_reason: FinishReason | None = None
    broken: str = ""
    cancelled: bool = False
    overfed: bool = False
    session_ended: bool = False
    banned: tuple[int, ...] = ()
    reader: ToolReader | None = None

    @property
    def ended(self) -> bool:
        """Whether it gets no more output."""
        return self.cancelled or bool(self.broken) or self.finish_reason is not None

    @property
    def session_id(self) -> str:
        """Whose turn it is, and to whom it leaves its KV; empty: nobody."""
        left = self.session_ended or self.broken or self.overfed
        return "" if left else self.request.session_id

    @property
    def length(self) -> int:
        """The most tokens of its KV, as its rotation has it."""
        return self.plan.rotated_length(self.request.length)

    @property
    def known_ids(self) -> Sequence[int]:
        """Outputs that are known before they are reached, from index 0 on."""
        return max(self.output_ids, self.request.forced_output_ids, key=len)

    def forced(self, index: int) -> int:
        """The id that output ``index`` is to be, or -1."""
        return self.known_ids[index] if index < len(self.known_ids) else -1

    @property
    def told(self) -> int:
        """Outputs that clients have."""
        return max(len(self.output_ids), len(self.request.forced_output_ids) - self.request.untold)

    @property
    def draws_all(self) -> bool:
        """Whether every row that it is fed tells of an output, also of one that is known."""
        return self.request.sampling.logprobs is not None

    @property
    def verifies(self) -> bool:
        """Whether its next step verifies; where outputs are known, drafts are not needed."""
        if self.drafting is None:
            return False
        ahead = min(self.drafting.ahead, self._most_ahead)
        return self.reached < len(self.known_ids) or len(self.drafts) >= ahead

    @property
    def ahead_ids(self) -> list[int]:
        """The outputs that its next verification is about: those that are known, or drafts."""
        if self.drafting is None or self.reached >= len(self.known_ids):
            return self.drafts
        most = min(self.drafting.most, self._most_ahead)
        return list(self.known_ids[self.reached : self.reached + most])

    def known_ahead(self, most: int) -> list[int]:
        """Known outputs, at most so many, that a decode step can feed behind the newest one.

        None behind a compression, and none where drafts are verified or attention chooses from the host.
        """
        if self.drafting is not None or self.plan.indexes:
            return []
        most = min(most, self._most_ahead)
        if self.plan.generation is not None:
            most = min(most, self.plan.generation.until_chunk(self.fed) - 1)
        return list(self.known_ids[self.reached : self.reached + most])

    @property
    def _most_ahead(self) -> int:
        """The last output is not fed, known or not."""
        return self.request.max_tokens - self.reached - 1

    @property
    def fed(self) -> int:
        """Output tokens that are in its KV, once it has been prefilled."""
        return self.reached - 1

    def verify(self, drawn: Sequence[int]) -> list[int]:
        """Ends a verification, which has ``drawn`` an id behind each id fed; returns those that hold."""
        assert self.drafting is not None
        ahead = self.ahead_ids
        right = next((i for i, (a, b) in enumerate(zip(ahead, drawn, strict=False)) if a != b), len(ahead))
        if ahead is self.drafts:
            self.drafting.verified(len(ahead), right)
        self.drafts = []
        return list(drawn[: right + 1])

    def accept(self, token: int, now: float, eos_ids: Collection[int]) -> Said:
        """Takes one output id; sets ``finish_reason`` if it is the last. Returns what it says."""
        stopping = self.request.stopping
        self.reached += 1
        if self.reached <= len(self.output_ids):
            return Said()
        given = self.told <= len(self.output_ids) < len(self.request.forced_output_ids)
        self.output_ids.append(token)
        self.token_times.append(now)
        # A grammar that has come to its end has none but that.
        enough = len(self.output_ids) >= stopping.min_tokens or self.request.constraint is not None
        may_stop = enough and not given
        text = self.detokenizer.push(token, may_stop)
        if may_stop and token in eos_ids and not stopping.ignore_eos:
            self.finish_reason = FinishReason.EOS
        elif may_stop and token in stopping.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.output_ids) == self.request.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None:
            text += self.detokenizer.flush()
        # Behind the flush, which may bring a stop string to light.
        if self.detokenizer.stop_string:
            self.finish_reason = FinishReason.STOP
        if self.reader is None:
            return Said(text)
        said = self.reader.push(text)
        return said if self.finish_reason is None else said + self.reader.finish()
