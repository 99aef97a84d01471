"""A request as the router keeps it. Pure."""

from dataclasses import dataclass, replace
from typing import cast

from pyramidserve.types import ChatMessage, Compression, Priority, Sampling, Stopping


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that is known to be sound.

    Attributes:
        sampling: its seed is always set.
        stopping: its ``max_tokens`` is always set.
        seed_given: the client chose the seed.
        messages: what was asked, if it was a conversation.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    compression: Compression
    session_id: str
    resume_output_ids: tuple[int, ...]
    seed_given: bool
    priority: Priority = "normal"
    messages: tuple[ChatMessage, ...] = ()

    @property
    def seed(self) -> int:
        return cast(int, self.sampling.seed)

    @property
    def max_tokens(self) -> int:
        return cast(int, self.stopping.max_tokens)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """All that decides the reply but the seed, which a client need not know yet."""
        sampling = replace(self.sampling, seed=None)
        return self.prompt_ids, sampling, self.stopping, self.compression, self.session_id

    def same_reply(self, live: "ValidatedRequest") -> bool:
        """Whether this asks for the reply that ``live`` is already getting."""
        same_seed = not self.seed_given or self.seed == live.seed
        return same_seed and self.fingerprint == live.fingerprint
