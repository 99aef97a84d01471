"""What a peer is given and what it answers; only the standard library, for every peer's own venv."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

Tell = Callable[[int, int], None]  # notes that a request, by its index, brought so many tokens
Generate = Callable[[Sequence[list[int]], Tell], None]


@dataclass(frozen=True)
class Job:
    """One run of a workload.

    Attributes:
        model: where the peer's form of the checkpoint is.
        precision: what the peer computes in, by its own name.
        kv_precision: what the peer stores KV in, by its own name; empty: what it chooses itself.
        output: greedy tokens of every prompt; end-of-sequence tokens do not end it.
        kv_bytes: KV memory that all requests share.
        kv_token_bytes: KV memory that a token takes.
        keep_tokens: how many tokens of a sequence eviction leaves; 0: there is none.
    """

    model: str
    precision: str
    kv_precision: str
    prompts: list[list[int]]
    output: int
    kv_bytes: int
    kv_token_bytes: int
    threads: int
    keep_tokens: int = 0

    def blocks(self, tokens: int) -> int:
        """Blocks of so many ``tokens`` that the KV memory holds."""
        return self.kv_bytes // (self.kv_token_bytes * tokens)

    def sequences(self, tokens: int) -> int:
        """Requests that can run at a time without eviction, in blocks of so many ``tokens``."""
        longest = max(map(len, self.prompts)) + self.output
        return min(len(self.prompts), self.blocks(tokens) // -(-longest // tokens))


@dataclass(frozen=True)
class Result:
    """What was measured; times in seconds, memory in bytes; None where it cannot be known.

    Attributes:
        prefill_tokens_per_second: prompt tokens until the last request's first token.
        decode_tokens_per_second: tokens after that moment; both None where requests came in waves.
        kv_bytes: the KV pool.
    """

    wall_seconds: float
    output_tokens_per_second: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    ttft_p50: float | None
    inter_token_p50: float | None
    kv_bytes: int
    peak_rss_bytes: int


def timed(job: Job, generate: Generate) -> Result:
    """Warms ``generate`` up with an eighth of the prompts, then times it over all of them."""
    generate(job.prompts[: max(1, len(job.prompts) // 8)], lambda index, count: None)
    times: list[list[float]] = [[] for _ in job.prompts]
    began = time.perf_counter()

    def tell(index: int, count: int) -> None:
        times[index] += [time.perf_counter() - began] * count

    generate(job.prompts, tell)
    wall = time.perf_counter() - began
    counts = [len(each) for each in times]
    if set(counts) != {job.output}:
        raise RuntimeError(f"the requests brought {counts} tokens, not {job.output} each")
    prefilled = max(each[0] for each in times)
    together = prefilled < min(each[-1] for each in times)
    decoded = sum(moment > prefilled for each in times for moment in each)
    return Result(
        wall_seconds=wall,
        output_tokens_per_second=sum(counts) / wall,
        prefill_tokens_per_second=sum(map(len, job.prompts)) / prefilled if together else None,
        decode_tokens_per_second=decoded / (wall - prefilled) if together else None,
        ttft_p50=median(each[0] for each in times),
        inter_token_p50=median(later - sooner for each in times for sooner, later in pairwise(each)),
        kv_bytes=job.kv_bytes,
        peak_rss_bytes=peak_rss(resource.RUSAGE_SELF),
    )


def peak_rss(who: int) -> int:
    """The largest resident memory of this process or of its children, in bytes."""
    return resource.getrusage(who).ru_maxrss * 1024


def answer(run: Callable[[Job], Result]) -> None:
    """A peer's main program: reads the job in the file on the command line, prints its result as JSON."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    # Libraries talk on standard output; from here on that goes to standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(asdict(run(job))), file=out, flush=True)
