"""What the ids that a step has drawn mean to its sequences. Pure."""

import itertools
from collections.abc import Collection, Mapping, Sequence

from pyramidserve.types import TokenLogprob, Tokens
from workers.schedule.sequence import RunningSequence
from workers.schedule.step import NO_TOKEN, NOT_FINITE, Step, StepKind
from workers.tools.reader import Said


def accept(
    step: Step,
    drawn: Sequence[int],
    sequences: Mapping[int, RunningSequence],
    eos_ids: Collection[int],
    now: float,
) -> list[tuple[int, Tokens]]:
    """Takes in what a prefill, a decode or a verification has drawn.

    A verification draws an id behind each that it fed, of which those hold that follow right drafts; what
    is drawn behind unverified output becomes a draft; else it is output. Known outputs that were fed
    along come before it. One that is cancelled takes in what its KV has, and tells of none.

    Args:
        drawn: one id of each sequence, or in a verification one of each row; NO_TOKEN breaks it.
        sequences: all that the step is about; they are changed.

    Returns:
        Of each sequence that has some, its new output, without what was known before.
    """
    for key, why in step.failed:
        sequences[key].broken = why
    ids, told, outputs = iter(drawn), iter(step.logprobs), []
    for row, (key, count) in enumerate(zip(step.sequences, step.draws, strict=True)):
        sequence, taken = sequences[key], list(itertools.islice(ids, count))
        logprobs = [each for each in itertools.islice(told, count) if each is not None]
        if step.kind is StepKind.VERIFY:
            taken = sequence.verify(taken)
        elif step.kind is StepKind.DECODE and sequence.drafting is not None:
            sequence.drafts += (max(token, 0) for token in taken)  # what is verified shows what is broken
            continue
        elif step.kind is StepKind.DECODE:
            taken = [*sequence.known_ahead(step.rows[row] - count), *taken]
        before = sequence.reached
        new = _output(sequence, taken, logprobs, eos_ids, now)
        sequence.overfed = step.kind is StepKind.DECODE and sequence.reached - before < len(taken)
        if new and not sequence.cancelled:
            outputs.append((key, new))
    return outputs


def _output(
    sequence: RunningSequence,
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob],
    eos_ids: Collection[int],
    now: float,
) -> Tokens | None:
    """Takes in the next outputs of a sequence; returns those that were not told, if any.

    ``logprobs``: of each of ``ids``, or none.
    """
    new: list[int] = []
    told: list[TokenLogprob] = []
    said = Said()
    for place, token in enumerate(ids):
        if token == NO_TOKEN:
            sequence.broken = sequence.broken or NOT_FINITE
            break
        known = sequence.reached < sequence.told
        added = sequence.accept(token, now, eos_ids)
        if not known:
            new.append(token)
            told += logprobs[place : place + 1]
            said += added
        if sequence.finish_reason is not None:
            break
    first = len(sequence.output_ids) - len(new)
    return Tokens(first, tuple(new), said.text, tuple(told), said.calls) if new else None
