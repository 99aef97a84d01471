"""How likely an engine finds given output, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

from pyramidserve.prompt import Prompt
from pyramidserve.types import Compression, Receipt, Sampling, Stopping
from workers.engine.engine import Engine, EngineRequest


@dataclass(frozen=True)
class Likelihood:
    """Of each output token the logarithm of its probability, and the likeliest in its place."""

    log_probabilities: tuple[float, ...]
    likeliest: tuple[int, ...]
    receipt: Receipt

    @property
    def kept(self) -> float:
        """Share of the prompt's tokens that stayed, over all layers."""
        return self.receipt.kv_keep_reached

    @property
    def total(self) -> float:
        """Of the output as a whole."""
        return sum(self.log_probabilities)


class Judge:
    """Has an engine read output that it did not choose."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(
        self,
        prompt: Prompt,
        output_ids: Sequence[int],
        compression: Compression,
        session_id: str = "",
    ) -> Likelihood:
        """How likely ``output_ids`` are behind ``prompt``; the turn leaves both to its session."""
        (read,) = self.read_all([(prompt, output_ids, compression)], session_id)
        return read

    def read_all(
        self, passages: Sequence[tuple[Prompt, Sequence[int], Compression]], session_id: str = ""
    ) -> list[Likelihood]:
        """As ``read``, of many prompts with their outputs and compressions at once."""
        requests = [
            EngineRequest(
                prompt,
                sampling=Sampling(logprobs=1),
                stopping=Stopping(max_tokens=len(output_ids)),
                compression=compression,
                given_output_ids=tuple(output_ids),
                session_id=session_id,
            )
            for prompt, output_ids, compression in passages
        ]
        return [
            Likelihood(
                tuple(each.logprob for each in reply.logprobs),
                tuple(each.top_ids[0] for each in reply.logprobs),
                reply.receipt,
            )
            for reply in self._engine.generate(requests)
        ]

    def end(self, session_id: str) -> None:
        """Forgets a session."""
        self._engine.end_session(session_id)
