"""Passages that a peer reads behind its own cache; only the standard library, for every peer's own venv."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Passage:
    """Token ids: what is compressed, what comes behind it, and then what is scored.

    ``question`` may be empty.
    """

    context: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class ReadingJob:
    """Passages that are read in one way.

    Attributes:
        model: where the checkpoint is.
        precision: what the peer computes in.
        method: what compresses, by its name at the peer.
        share: of the context's tokens that stay; 1 where all do.
    """

    model: str
    precision: str
    threads: int
    method: str
    share: float
    passages: list[Passage]


@dataclass(frozen=True)
class Reading:
    """Of each token of an answer the logarithm of its probability, and the likeliest in its place.

    ``kept``: bytes that the context's KV takes, of those that it takes in 16 bits.
    """

    log_probabilities: list[float]
    likeliest: list[int]
    kept: float


def answer(read: Callable[[ReadingJob], Iterable[Reading]]) -> None:
    """A peer's main program: reads the job in the file on the command line, prints a line a passage."""
    told = json.loads(Path(sys.argv[1]).read_text())
    job = ReadingJob(**{**told, "passages": [Passage(**each) for each in told["passages"]]})
    # Libraries talk on standard output; from here on that goes to standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for each in read(job):
        print(json.dumps(asdict(each)), file=out, flush=True)
