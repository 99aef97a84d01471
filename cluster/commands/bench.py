"""`pyramidserve bench engine`: how fast the engine is on this machine, in this process."""

import argparse
import dataclasses
import json
import resource
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.commands.serve import say
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.measure import Run, TimedPipeline, measure
from workers.bench.roofline import floor_seconds, machine_limits
from workers.bench.workload import WORKLOADS, requests
from workers.engine.engine import Engine, EngineConfig
from workers.kernels.choose import choose_dtype
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import DTYPES, read_config

SUMMARY = "measure the engine in this process"

CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    engine = subjects.add_parser("engine", help=SUMMARY, description=SUMMARY)
    engine.add_argument("--workload", choices=WORKLOADS, default="W2")
    engine.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    engine.add_argument("--policy", default="full", help="full (default), streaming or pyramid")
    engine.add_argument("--prefill", default="prune", help="prune (default) or evict")
    engine.add_argument("--kv-keep", type=float, metavar="SHARE", help="of the prompt's KV")
    engine.add_argument("--dtype", default="auto", choices=DTYPES)
    engine.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    engine.add_argument("--repetitions", type=int, default=3, metavar="N")
    engine.add_argument("--json", type=Path, metavar="OUT", help="write everything that was measured")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the medians, and writes the runs."""
    for name in ("threads", "repetitions"):
        if getattr(arguments, name) < 1:
            raise InvalidRequestError(f"--{name} is {getattr(arguments, name)}; it must be 1 or more")
    torch.set_num_threads(arguments.threads)
    workload = WORKLOADS[arguments.workload]
    checkpoint = resolve_checkpoint(arguments.model, say)
    model = read_config(checkpoint)
    dtype = choose_dtype(arguments.dtype, CPU)
    pool_bytes = workload.pool_bytes(model, dtype.itemsize)
    config = EngineConfig(
        str(checkpoint), dtype=str(dtype).removeprefix("torch."), kv_bytes=pool_bytes, host_bytes=pool_bytes
    )
    engine = Engine(config, TimedPipeline)
    pipeline = engine.pipeline
    assert isinstance(pipeline, TimedPipeline)
    compression = Compression(arguments.policy, arguments.prefill, arguments.kv_keep)
    work = requests(workload, engine.tokenizer, compression)
    say("warming up")
    for stage in engine.stages:  # as on a server that has run for a while
        stage.cache.pool.rows.zero_()
    measure(engine, pipeline, work[: max(1, len(work) // 8)])
    runs = []
    for number in range(arguments.repetitions):
        runs.append(measure(engine, pipeline, work))
        say(f"run {number + 1}: {runs[-1].output_tokens_per_second:.1f} output tokens/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limits = machine_limits(model, dtype)
    middle = medians(runs)
    floor = floor_seconds(runs[0], workload, model, limits, dtype.itemsize)
    results = {
        "workload": {"name": arguments.workload, **dataclasses.asdict(workload)},
        "compression": dataclasses.asdict(compression),
        "dtype": config.dtype,
        "threads": arguments.threads,
        **middle,
        "peak_rss_bytes": peak,
        "step_shares": {what: median(each.shares[what] for each in runs) for what in runs[0].shares},
        "machine": dataclasses.asdict(limits),
        "roofline_fraction": floor / middle["wall_seconds"],
        "spread": spread(runs),
        "runs": [dataclasses.asdict(each) for each in runs],
    }
    engine.check_integrity()
    print(describe(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


def medians(runs: list[Run]) -> dict[str, Any]:
    """The median of every number over the runs."""
    return {
        field.name: median(getattr(each, field.name) for each in runs)
        for field in dataclasses.fields(Run)
        if field.name not in ("turns", "shares")
    }


def spread(runs: list[Run]) -> float:
    """How far apart the runs' speeds are, over their median."""
    speeds = [each.output_tokens_per_second for each in runs]
    return (max(speeds) - min(speeds)) / median(speeds)


def describe(results: dict[str, Any]) -> str:
    """The results in a few lines."""
    of = results["workload"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in results["step_shares"].items())
    mebibyte = 2**20
    return "\n".join(
        (
            f"{of['name']}: {of['requests']} x ({of['prompt']} + {of['output']}) tokens, "
            f"{results['compression']['policy']}, {results['dtype']}, {results['threads']} threads",
            f"  output     {results['output_tokens_per_second']:.1f} tokens/s over the wall clock of "
            f"{results['wall_seconds']:.2f} s (spread {results['spread']:.0%})",
            f"  prefill    {results['prefill_tokens_per_second']:.0f} tokens/s; "
            f"decode {results['decode_tokens_per_second']:.1f} tokens/s, "
            f"{results['decode_step_p50'] * 1000:.1f} ms a step",
            f"  latency    first token p50 {results['ttft_p50']:.2f} s, p99 {results['ttft_p99']:.2f} s; "
            f"inter-token p50 {results['inter_token_p50'] * 1000:.1f} ms, "
            f"p99 {results['inter_token_p99'] * 1000:.1f} ms",
            f"  memory     KV peak {results['kv_bytes_peak'] / mebibyte:.0f} MiB, "
            f"mean {results['kv_bytes_mean'] / mebibyte:.0f} MiB, "
            f"spilled {results['spilled_bytes'] / mebibyte:.0f} MiB, "
            f"resident peak {results['peak_rss_bytes'] / mebibyte:.0f} MiB",
            f"  steps      {parts}",
            f"  roofline   {results['roofline_fraction']:.0%} of what the machine could do at best",
        )
    )
