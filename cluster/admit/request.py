"""A request as the router keeps it. Pure."""

from dataclasses import dataclass, replace
from typing import cast

from pyramidserve.chat import Chat
from pyramidserve.types import Compression, Constraint, Priority, Sampling, Stopping
from workers.budget.span import Span
from workers.tools.reader import CallSyntax


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that is known to be sound.

    Attributes:
        sampling: its seed is always set.
        stopping: its ``max_tokens`` is always set.
        seed_given: the client chose the seed.
        limited: the client chose ``max_tokens``.
        chat: what was asked, if it was a conversation.
        calls: how tools are called in the reply, if it may call any.
        given_output_ids: output that is not drawn.
        constraint: what the text of the reply must be.
        owner: among whose conversations its next turn is looked for by what was said; "": it is not.
        instructions: of the prompt, in order, where a floor keeps some of them.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    compression: Compression
    session_id: str
    resume_output_ids: tuple[int, ...]
    seed_given: bool
    limited: bool = True
    priority: Priority = "normal"
    chat: Chat | None = None
    calls: CallSyntax | None = None
    given_output_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    owner: str = ""
    instructions: tuple[Span, ...] = ()

    @property
    def seed(self) -> int:
        return cast(int, self.sampling.seed)

    @property
    def max_tokens(self) -> int:
        return cast(int, self.stopping.max_tokens)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """All that decides the reply but what a client need not know yet: the seed, and ``max_tokens``."""
        sampling, stopping = replace(self.sampling, seed=None), replace(self.stopping, max_tokens=None)
        told = self.session_id, self.given_output_ids, self.constraint, self.calls, self.instructions
        return self.prompt_ids, sampling, stopping, self.compression, *told

    def same_reply(self, live: "ValidatedRequest") -> bool:
        """Whether this asks for the reply that ``live`` is already getting."""
        same_seed = not self.seed_given or self.seed == live.seed
        same_limit = not self.limited or self.max_tokens == live.max_tokens
        return same_seed and same_limit and self.fingerprint == live.fingerprint
