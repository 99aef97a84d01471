"""`pyramidserve bench`: how fast the engine is, what its caches keep, and a cluster under load."""

import argparse
import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.commands import bench_quality, bench_serve
from cluster.commands.policy import add_policy_arguments, compression_here
from cluster.commands.serve import say
from cluster.partition import boundaries, layer_costs
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.bench.gang import gang
from workers.bench.measure import Run, TurnLog, measure, warm_up
from workers.bench.roofline import floor, machine_limits
from workers.bench.stall import measure_stall
from workers.bench.workload import LATE_PROMPT, STREAMS, WORKLOADS, Workload, named_workload, requests
from workers.budget.kv_format import KV_DTYPES, stored
from workers.device import device_memory, open_device
from workers.engine.choose import choose_dtype
from workers.engine.engine import Engine, EngineConfig
from workers.engine.pipeline import connect_local
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import DTYPES, read_config
from workers.policies.registry import plan
from workers.policies.settled import settled

SUMMARY = "measure the engine on this machine, or a running cluster"
ENGINE = "tokens per second of a workload, and where the time goes"
STALL = "how long running streams wait while a long prompt is prefilled"

MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    engine = subjects.add_parser("engine", help=ENGINE, description=ENGINE)
    engine.add_argument(
        "--workload", default="W2", help=f"{', '.join(WORKLOADS)}, or sizes like 8x1024+64; default: W2"
    )
    engine.add_argument(
        "--shards", type=int, default=1, metavar="N", help="processes that share the layers and threads"
    )
    stall = subjects.add_parser("stall", help=STALL, description=STALL)
    serve = subjects.add_parser("serve", help=bench_serve.DESCRIPTION, description=bench_serve.DESCRIPTION)
    bench_serve.add_arguments(serve)
    quality = subjects.add_parser(
        "quality", help=bench_quality.SUMMARY, description=bench_quality.DESCRIPTION
    )
    bench_quality.add_arguments(quality)
    for subject, measured in ((engine, run_engine), (stall, run_stall)):
        subject.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
        add_policy_arguments(subject, "full")
        subject.add_argument("--dtype", default="auto", choices=DTYPES)
        subject.add_argument(
            "--kv-dtype", default="auto", choices=KV_DTYPES, help="of KV; default: --dtype"
        )
        subject.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        subject.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
        subject.add_argument("--repetitions", type=int, default=3, metavar="N")
        subject.add_argument("--json", type=Path, metavar="OUT", help="write everything that was measured")
        subject.set_defaults(measured=measured)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the medians, and writes the runs."""
    for name in ("threads", "repetitions", "shards"):
        if getattr(arguments, name, 1) < 1:
            raise InvalidRequestError(f"--{name} is {getattr(arguments, name)}; it must be 1 or more")
    torch.set_num_threads(arguments.threads)
    results = arguments.measured(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


def run_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints a workload."""
    workload = named_workload(arguments.workload)
    compression = compression_here(arguments)
    with _engine(arguments, workload, compression, arguments.shards) as (engine, log):
        work = requests(workload, engine.tokenizer, compression)
        say("warming up")
        warm_up(engine, log, work[: max(1, len(work) // 8)])
        runs = []
        for number in range(arguments.repetitions):
            runs.append(measure(engine, log, work))
            say(f"run {number + 1}: {runs[-1].output_tokens_per_second:.1f} output tokens/s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        engine.check_integrity()
    facts = engine.facts[0]
    dtype: torch.dtype = getattr(torch, facts.dtype)
    device = engine.stages[0].device
    limits = machine_limits(engine.model, dtype, device)
    asked = settled(compression, engine.model, facts.layout.kv_dtype, workload.prompt)
    keep = plan(asked, workload.prompt, engine.model.layers)
    least = floor(runs[0], workload, engine.model, keep, limits, dtype.itemsize)
    middle = medians(runs)
    whole_model = arguments.shards == 1  # is in this process, whose turns are known
    results = {
        "workload": {"name": arguments.workload, **dataclasses.asdict(workload)},
        "compression": dataclasses.asdict(asked),
        "model": dataclasses.asdict(engine.model),
        "pool_bytes": workload.pool_bytes(engine.model, dtype.itemsize),
        "dtype": facts.dtype,
        "kv_dtype": facts.layout.kv_dtype,
        "threads": arguments.threads,
        "shards": arguments.shards,
        **middle,
        "peak_rss_bytes": peak,
        "device": str(device),
        "device_peak_bytes": device_memory(device).peak,
        "step_shares": {what: median(each.shares[what] for each in runs) for what in runs[0].shares},
        "machine": dataclasses.asdict(limits),
        "roofline": {
            "prefill": least.prefill / middle["prefill_seconds"] if whole_model else None,
            "decode_step": least.decode_step / middle["decode_step_p50"]
            if whole_model and runs[0].turns["decode"]
            else None,
            "whole": least.whole / middle["wall_seconds"],
        },
        "spread": spread(runs),
        "runs": [dataclasses.asdict(each) for each in runs],
    }
    print(describe(results))
    return results


def run_stall(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints how streams are held up."""
    compression = compression_here(arguments)
    late = Workload(1, LATE_PROMPT, 1)
    with _engine(arguments, STREAMS, compression, 1, late.prompt + late.output) as (engine, _):
        streams = requests(STREAMS, engine.tokenizer, compression)
        (prompt,) = requests(late, engine.tokenizer, compression)
        runs = [measure_stall(engine, streams, prompt) for _ in range(arguments.repetitions)]
        engine.check_integrity()
    ratios = [each.busy_p99 / each.quiet_p50 for each in runs]
    results = {
        "compression": dataclasses.asdict(compression),
        "threads": arguments.threads,
        "busy_p99_over_quiet_p50": median(ratios),
        "runs": [dataclasses.asdict(each) for each in runs],
    }
    print(
        f"{STREAMS.requests} streams, {compression.policy}, {arguments.threads} threads: "
        f"a token in {median(each.quiet_p50 for each in runs) * 1000:.1f} ms; while {LATE_PROMPT} tokens "
        f"are prefilled, which takes {median(each.late_ttft for each in runs):.2f} s, p50 "
        f"{median(each.busy_p50 for each in runs) * 1000:.1f} ms, "
        f"p99 {median(each.busy_p99 for each in runs) * 1000:.1f} ms: "
        f"{median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return results


@contextmanager
def _engine(
    arguments: argparse.Namespace, workload: Workload, compression: Compression, shards: int, more: int = 0
) -> Iterator[tuple[Engine, TurnLog]]:
    """An engine with room for ``workload`` and ``more`` tokens, and the log of its turns."""
    checkpoint = resolve_checkpoint(arguments.model, say)
    model = read_config(checkpoint)
    if shards > model.layers:
        raise InvalidRequestError(f"--shards is {shards}; the model has {model.layers} layers")
    device = open_device(arguments.device)
    if shards > 1 and device.type != "cpu":
        raise InvalidRequestError(
            f"--shards is {shards} and --device {arguments.device!r}: processes are measured on CPUs; "
            "give one"
        )
    dtype = choose_dtype(arguments.dtype, device)
    name = str(dtype).removeprefix("torch.")
    pool_bytes = workload.pool_bytes(model, dtype.itemsize, more)
    costs = layer_costs(model, compression, stored(arguments.kv_dtype, name))
    config = EngineConfig(
        str(checkpoint),
        dtype=name,
        kv_dtype=arguments.kv_dtype,
        device=str(device),
        kv_bytes=pool_bytes,
        host_bytes=pool_bytes,
        boundaries=boundaries(*costs, shards),
    )
    log = TurnLog()
    if shards == 1:
        yield Engine(config, partial(connect_local, on_advance=log)), log
        return
    with gang(max(1, arguments.threads // shards), log) as connect:
        yield Engine(config, connect), log


def medians(runs: list[Run]) -> dict[str, Any]:
    """The median of every number over the runs; None where there is none."""
    names = [field.name for field in dataclasses.fields(Run) if field.name not in ("turns", "shares")]
    return {
        name: None if getattr(runs[0], name) is None else median(getattr(each, name) for each in runs)
        for name in names
    }


def spread(runs: list[Run]) -> float:
    """How far apart the runs' speeds are, over their median."""
    speeds = [each.output_tokens_per_second for each in runs]
    return (max(speeds) - min(speeds)) / median(speeds)


def describe(results: dict[str, Any]) -> str:
    """The results in a few lines."""
    of, roofline, device_peak = results["workload"], results["roofline"], results["device_peak_bytes"]
    parts = ", ".join(f"{name} {share:.0%}" for name, share in results["step_shares"].items())

    def rate(name: str, style: Callable[[float], str]) -> str:
        return "in waves" if results[name] is None else style(results[name])

    shares = "".join(
        f"{what} {roofline[name]:.0%}, "
        for what, name in (("prefill", "prefill"), ("a decode step", "decode_step"), ("all", "whole"))
        if roofline[name] is not None
    )
    return "\n".join(
        (
            f"{of['name']}: {of['requests']} x ({of['prompt']} + {of['output']}) tokens, "
            f"{results['compression']['policy']}, {results['dtype']}, KV {results['kv_dtype']}, "
            f"{results['threads']} threads, {results['shards']} shard(s)",
            f"  output     {results['output_tokens_per_second']:.1f} tokens/s over the wall clock of "
            f"{results['wall_seconds']:.2f} s (spread {results['spread']:.0%})",
            f"  prefill    {rate('prefill_tokens_per_second', '{:.0f} tokens/s'.format)}, "
            f"{results['prefill_seconds']:.2f} s in all",
            f"  decode     {rate('decode_tokens_per_second', '{:.1f} tokens/s'.format)}, "
            f"{results['decode_step_p50'] * 1000:.1f} ms a step",
            f"  latency    first token p50 {results['ttft_p50']:.2f} s, p99 {results['ttft_p99']:.2f} s; "
            f"inter-token p50 {results['inter_token_p50'] * 1000:.1f} ms, "
            f"p99 {results['inter_token_p99'] * 1000:.1f} ms",
            f"  memory     KV peak {results['kv_bytes_peak'] / MEBIBYTE:.0f} MiB, "
            f"mean {results['kv_bytes_mean'] / MEBIBYTE:.0f} MiB, "
            f"spilled {results['spilled_bytes'] / MEBIBYTE:.0f} MiB, "
            f"resident peak {results['peak_rss_bytes'] / MEBIBYTE:.0f} MiB"
            + (f", {results['device']} peak {device_peak / MEBIBYTE:.0f} MiB" if device_peak else ""),
            f"  time       {parts}",
            f"  roofline   {shares}of what the machine could do at best",
        )
    )
