"""How likely an engine finds given output, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyramidserve.types import Compression, Receipt, Stopping
from workers.engine.engine import Engine, EngineRequest
from workers.schedule.step import Step


@dataclass(frozen=True)
class Likelihood:
    """Of each output token the logarithm of its probability, and the likeliest in its place."""

    log_probabilities: tuple[float, ...]
    likeliest: tuple[int, ...]
    receipt: Receipt

    @property
    def total(self) -> float:
        """Of the output as a whole."""
        return sum(self.log_probabilities)


class Judge:
    """Has an engine of one process read output that it did not choose.

    Attributes:
        rows: logits [outputs, vocabulary] of every step since they were cleared.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: list[torch.Tensor] = []
        stage = engine.stages[-1]
        sample = stage._sample

        def recorded(step: Step, hidden: torch.Tensor) -> tuple[Step, torch.Tensor]:
            # Known output is fed several at a time, and of these only the last would be drawn from.
            self.rows.append(stage.model.logits(hidden))
            return sample(step, hidden)

        stage._sample = recorded  # type: ignore[method-assign]

    def read(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        compression: Compression,
        session_id: str = "",
    ) -> Likelihood:
        """How likely ``output_ids`` are behind a prompt; the turn leaves both to its session."""
        self.rows.clear()
        request = EngineRequest(
            prompt_ids,
            stopping=Stopping(max_tokens=len(output_ids), ignore_eos=True),
            compression=compression,
            resume_output_ids=tuple(output_ids),
            session_id=session_id,
        )
        (reply,) = self._engine.generate([request])
        # All that is fed is known, so every row stands; the last output may have been fed too.
        logits = torch.cat(self.rows)[: len(output_ids)]
        chosen = logits.log_softmax(dim=-1)[torch.arange(len(output_ids)), torch.tensor(output_ids)]
        likeliest = tuple(logits.argmax(dim=-1).tolist())
        return Likelihood(tuple(chosen.tolist()), likeliest, reply.receipt)
