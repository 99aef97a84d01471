"""A turn that is simulated, from its arrival to its end."""

import math
from dataclasses import dataclass
from functools import lru_cache

from cluster.admit.request import ValidatedRequest
from pyramidserve.types import Compression, Sampling, Stopping


@dataclass(eq=False)
class SimulatedTurn:
    """What a user asks for, and when it came; seconds since the beginning, NaN until it did.

    Attributes:
        answer_tokens: output tokens that it will have, which the router does not know.
        began: when a pipeline was told of it.
        preemptions: how often it had to make room.
        refused: the queue was full.
    """

    request: ValidatedRequest
    answer_tokens: int
    arrived: float
    tenant: str = ""
    deadline: float = math.inf
    began: float = math.nan
    first_token: float = math.nan
    ended: float = math.nan
    preemptions: int = 0
    refused: bool = False

    @property
    def inter_token(self) -> float:
        """Mean seconds between output tokens."""
        return (self.ended - self.first_token) / max(1, self.answer_tokens - 1)


def simulated_turn(
    prompt_tokens: int,
    answer_tokens: int,
    most_tokens: int,
    compression: Compression,
    session_id: str,
    arrived: float,
) -> SimulatedTurn:
    """A turn that may have ``most_tokens``; where it could not but have them, the router knows."""
    request = ValidatedRequest(
        request_id=session_id,
        prompt_ids=_ids(prompt_tokens),
        sampling=Sampling(seed=0),
        stopping=Stopping(most_tokens, ignore_eos=answer_tokens == most_tokens),
        compression=compression,
        session_id=session_id,
        resume_output_ids=(),
        seed_given=True,
    )
    return SimulatedTurn(request, answer_tokens, arrived)


@lru_cache(maxsize=1 << 14)
def _ids(tokens: int) -> tuple[int, ...]:
    """Which ids they are makes no difference."""
    return (0,) * tokens
