"""With recall "exact": that replies are the full cache's, how often drafts are right, and what it costs."""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pyramidserve.types import Compression, Receipt, Sampling, Stopping
from workers.bench.texts import windows
from workers.budget.kv_format import KV_DTYPES, KV_FORMATS
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.loop import SequenceFinished, SequenceTokens
from workers.engine.pipeline import connect_local
from workers.kv.link import PacedLink
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import read_config

FULL = Compression()
EXACT = Compression("pyramid", "evict", 0.45, recall="exact")
OTHERS = (FULL, Compression("pyramid", "prune", 0.45), Compression("pyramid", "evict", 0.45, recall="step"))
TIMED = {
    "full": FULL,
    "off": Compression("pyramid", "evict", 0.45),
    "step": Compression("pyramid", "evict", 0.45, recall="step"),
    "exact": EXACT,
}
# A stream is compared up to the first step whose two best logits are closer than this.
MARGIN = 1e-3
LATENCY = 10e-6
GIGABYTE = 1e9


def build(
    model: str, dtype: str, gigabytes_per_second: float, shards: int = 1, kv_dtype: str = "auto"
) -> Engine:
    """An engine whose host memory, in the model's type, is behind a link of that bandwidth."""
    layers = read_config(resolve_checkpoint(model)).layers
    config = EngineConfig(
        model,
        dtype=dtype,
        kv_dtype=kv_dtype,
        host_kv_dtype="auto" if kv_dtype == "auto" else dtype,
        boundaries=tuple(layers * rank // shards for rank in range(1, shards)),
        kv_bytes=1 << 30,
        host_bytes=1 << 30,
        max_sequences=16,
    )
    link = functools.partial(PacedLink, gigabytes_per_second * GIGABYTE, LATENCY)
    return Engine(config, functools.partial(connect_local, link=link))


def ask(ids: Sequence[int], output: int, compression: Compression) -> EngineRequest:
    """A request for ``output`` tokens."""
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    return EngineRequest(ids, stopping=stopping, compression=compression)


def compare(
    model: str, prompts: list[list[int]], output: int, shards: int, kv_dtype: str, kv_keep: float
) -> dict[str, Any]:
    """Runs every prompt with the full cache, alone, and with "exact" among others, fp32."""
    whole = build(model, "float32", 25, shards)
    engine = whole if kv_dtype == "auto" else build(model, "float32", 25, shards, kv_dtype)
    exact = replace(EXACT, kv_keep=kv_keep)
    expected, certain = [], []
    for prompt in prompts:
        (reply,) = whole.generate([replace(ask(prompt, output, FULL), sampling=Sampling(logprobs=2))])
        best = [each.top_logprobs for each in reply.logprobs]
        ties = [index for index, (first, second) in enumerate(best) if first - second < MARGIN]
        expected.append(reply.token_ids)
        certain.append(min(ties, default=output))
    receipts: list[Receipt] = []
    for first in range(0, len(prompts), 5):
        batch = prompts[first : first + 5]
        others = [ask(prompt, output, OTHERS[i % len(OTHERS)]) for i, prompt in enumerate(batch)]
        replies = engine.generate([ask(prompt, output, exact) for prompt in batch] + others)
        for index, reply in enumerate(replies[: len(batch)], first):
            end = certain[index]
            if reply.token_ids[:end] != expected[index][:end]:
                raise SystemExit(f"prompt {index}: {reply.token_ids[:end]} is not {expected[index][:end]}")
            receipts.append(reply.receipt)
    right, accepted = drafting(receipts)
    per_token = spilled = 0.0
    for receipt in receipts:
        spilled += receipt.spilled_bytes
        per_token += receipt.host_attended_bytes / (output - 1)
    kept = max(receipt.kv_keep_reached for receipt in receipts)
    form = KV_FORMATS["float32" if kv_dtype == "auto" else kv_dtype]
    return {
        "kv_dtype": form.name,
        "shards": shards,
        "prompts": len(prompts),
        "cut_short": sum(end < output for end in certain),
        "tokens_compared": sum(certain),
        "acceptance": right,
        "accepted_a_verification": accepted,
        "host_bytes_per_token_of_spilled": per_token / spilled,
        "device_share": kept,
        "device_bytes_of_16_bits": kept * form.share(engine.model.head_size),
    }


def drafting(receipts: Sequence[Receipt]) -> tuple[float, float]:
    """The share of all drafts that were right, and how many were accepted a verification."""
    drafted = sum(receipt.drafted_tokens for receipt in receipts)
    accepted = sum(receipt.accepted_tokens for receipt in receipts)
    rounds = sum(receipt.output_tokens - 1 for receipt in receipts) - accepted
    return accepted / max(1, drafted), accepted / max(1, rounds)


def speed(
    engine: Engine, tokens: int, output: int, sequences: int, compression: Compression
) -> tuple[float, float, float]:
    """Output tokens a second once all have begun, drafts right, and drafts accepted a verification."""
    prompts = windows(engine.tokenizer, tokens, sequences)
    for prompt in prompts:
        engine.submit(ask(prompt, output, compression))
    began, receipts = 0.0, []
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, SequenceFinished):
                receipts.append(event.receipt)
            elif isinstance(event, SequenceTokens) and event.tokens.index == 0:
                began = time.perf_counter()
    seconds = time.perf_counter() - began
    return sequences * (output - 1) / seconds, *drafting(receipts)


def main() -> None:
    """Prints tables and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    parser.add_argument("--prompts", type=int, default=50, metavar="N", help="to be compared; 0: none")
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, default="auto", help="of the device where replies are compared"
    )
    parser.add_argument("--kv-keep", type=float, default=EXACT.kv_keep, help="where they are compared")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4000], help="timed prompts")
    parser.add_argument("--reply", type=int, default=128, metavar="TOKENS", help="to each prompt")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8], help="at once, timed")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="in turns; medians are printed")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"equal": [], "speed": []}
    if arguments.prompts:
        judge = build(arguments.model, "float32", 25)
        lengths = torch.linspace(200, 4000, arguments.prompts).int().tolist()
        text = [token for piece in windows(judge.tokenizer, 4000, 40) for token in piece]
        starts = range(0, len(text) - 4000, max(1, (len(text) - 4000) // arguments.prompts))
        prompts = [text[start : start + n] for start, n in zip(starts, lengths, strict=False)]
        for shards in (1, 2):
            how = (shards, arguments.kv_dtype, arguments.kv_keep)
            results["equal"].append(compare(arguments.model, prompts, arguments.reply, *how))
            print(results["equal"][-1], flush=True)
    for tokens in arguments.tokens:
        for gigabytes in (25, 5):
            engine = build(arguments.model, "auto", gigabytes)
            for sequences in arguments.sequences:
                runs: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in TIMED}
                for _ in range(arguments.runs):
                    for mode, compression in TIMED.items():
                        runs[mode].append(speed(engine, tokens, arguments.reply, sequences, compression))
                results["speed"].append(
                    {"tokens": tokens, "gigabytes": gigabytes, "sequences": sequences, "runs": runs}
                )
                rates = {mode: median(run[0] for run in own) for mode, own in runs.items()}
                print(
                    f"{tokens} tokens, {gigabytes} GB/s, {sequences} at once, tokens/s: "
                    + ", ".join(f"{mode} {rate:.0f}" for mode, rate in rates.items())
                    + f"; {median(run[1] for run in runs['exact']):.2f} of drafts right, "
                    f"{median(run[2] for run in runs['exact']):.1f} a verification",
                    flush=True,
                )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
