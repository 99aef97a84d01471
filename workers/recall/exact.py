"""Recall "exact": drafts are verified over all KV, of the device and the host, in one step.

Where the host has another format than the device, it has all KV in that, and they are verified over it.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from workers.execute.decode import Decoder
from workers.execute.generation import Generation
from workers.kv.cache import ShardCache
from workers.kv.link import Copy
from workers.kv.pool import PagedStep
from workers.recall.new_rows import NewRows
from workers.schedule.step import Step


def verify(
    step: Step, inputs: torch.Tensor, decoder: Decoder, cache: ShardCache, generation: Generation
) -> torch.Tensor:
    """Takes the rows of a verification through a shard; ``inputs`` and result as in ``Decoder.run``."""
    paged, copy = feed(step.fed, cache, generation)
    new = NewRows(step.fed, paged, cache) if cache.mirrors else None
    hidden, _ = decoder.run(step, inputs, new.paged if new else paged)
    copy.wait_on_device()
    if new:
        new.store()
    return hidden


def feed(fed: Sequence[int], cache: ShardCache, generation: Generation) -> tuple[PagedStep, Copy]:
    """Makes room for new tokens, ``fed`` naming the sequence of each, in place of what is not verified.

    Returns where all KV lies, also what is on the host, with a row for each new token; and a copy that
    must be done before the step is.
    """
    for sequence, count in Counter(fed).items():
        cache.take_back(sequence, generation.unverified(sequence))
        generation.fed_to_verify(sequence, count)
    on_host, copy = cache.host.attend(fed, cache.layers)
    return cache.extend(fed, on_host), copy
