"""What the path client → router → head costs beside the same engine in one process, in pairs, in turns.

A Ray cluster is up on both sides. Everything shares this machine, the client too.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch

from bench.recall.turns import first_token
from cluster.commands.serve import say
from cluster.config import parse_config
from cluster.deploy.deployment import DEFAULT_DEPLOYMENT, Deployment
from cluster.deploy.serving import serving
from pyramidserve import AsyncClient, Receipt, Tokens
from pyramidserve.types import Compression
from workers.bench.measure import TurnLog, measure
from workers.bench.workload import WORKLOADS, Workload, named_workload, requests
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.engine.pipeline import connect_local

FULL = Compression("full")
LONE = Workload(1, 32, 2)
# Of the engine, on both sides.
THREADS = 2


@dataclass(frozen=True)
class Pair:
    """A workload through the cluster and in this process: output tokens a second.

    ``router_cpu``, ``head_cpu``: microseconds a token of the router's process, and of the head's threads
    that compute nothing, beyond what they take while this process computes and they have nothing to do.
    """

    cluster: float
    process: float
    router_cpu: float
    head_cpu: float


def measure_pairs(
    target: str, engine: Engine, log: TurnLog, work: Sequence[EngineRequest], count: int
) -> list[Pair]:
    """Runs ``work`` ``count`` times each way, first one and then the other first."""
    pairs: list[Pair] = []
    router, head = _processes(target)
    engine_threads: list[int] = []
    for number in range(count + 1):
        sides: dict[str, float] = {}
        cpu: dict[str, tuple[float, float]] = {}
        took: dict[str, float] = {}
        tokens = 0
        for side in ("cluster", "process") if number % 2 else ("process", "cluster"):
            before, began = (_threads(router), _threads(head)), time.perf_counter()
            if side == "process":
                sides[side] = measure(engine, log, work).output_tokens_per_second
            else:
                sides[side], tokens = asyncio.run(_through_the_cluster(target, work))
            seconds = time.perf_counter() - began
            spent = _spent(router, before[0]), _spent(head, before[1])
            if side == "cluster":  # where the engine's threads are the busiest
                engine_threads = sorted(spent[1], key=spent[1].__getitem__)[-THREADS:]
            others = [each for thread, each in spent[1].items() if thread not in engine_threads]
            cpu[side] = sum(spent[0].values()) / seconds, sum(others) / seconds
            took[side] = seconds
        if number:  # the first warms up
            micros = 1e6 * took["cluster"] / tokens
            router_cpu, head_cpu = (
                (with_load - without) * micros
                for with_load, without in zip(cpu["cluster"], cpu["process"], strict=True)
            )
            pair = Pair(sides["cluster"], sides["process"], router_cpu, head_cpu)
            pairs.append(pair)
            print(
                f"{pair.cluster:.1f} tokens/s through the cluster, {pair.process:.1f} in one process; "
                f"CPU a token: router {pair.router_cpu:.0f} µs, head {pair.head_cpu:.0f} µs",
                flush=True,
            )
    return pairs


def measure_first_tokens(
    target: str, engine: Engine, prompts: Sequence[EngineRequest]
) -> list[tuple[float, float]]:
    """Seconds to the first token of each lone prompt: through the cluster, and in this process."""

    async def through_the_cluster() -> list[tuple[float, float]]:
        times = []
        async with AsyncClient(target) as client:
            for number, request in enumerate(prompts):
                if number % 2:
                    there = await _first_token(client, request)
                    here, *_ = first_token(engine, request)
                else:
                    here, *_ = first_token(engine, request)
                    there = await _first_token(client, request)
                times.append((there, here))
        return times

    return asyncio.run(through_the_cluster())


async def _through_the_cluster(target: str, work: Sequence[EngineRequest]) -> tuple[float, int]:
    """Output tokens a second of all streams together, and how many tokens there were."""

    async def play(client: AsyncClient, request: EngineRequest) -> int:
        count = 0
        async with _stream(client, request) as events:
            async for event in events:
                count += len(event.token_ids) if isinstance(event, Tokens) else 0
        return count

    async with AsyncClient(target) as client:
        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(play(client, request) for request in work)))
        return tokens / (time.perf_counter() - began), tokens


def _stream(client: AsyncClient, request: EngineRequest) -> Any:
    return client.stream(request.prompt, stopping=request.stopping, compression=FULL)


async def _first_token(client: AsyncClient, request: EngineRequest) -> float:
    began, seconds = time.perf_counter(), 0.0
    async with _stream(client, request) as events:
        async for event in events:
            if isinstance(event, Tokens):
                seconds = seconds or time.perf_counter() - began
            elif isinstance(event, Receipt):
                return seconds
    raise AssertionError("the stream ended without a receipt")


def _processes(target: str) -> tuple[psutil.Process, psutil.Process]:
    """The router's, which listens at the target, and the head's."""

    async def head() -> int:
        async with AsyncClient(target) as client:
            return (await client.cluster_state()).pipelines[0].stages[0].pid

    port = int(target.rpartition(":")[2])
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    router = next(each.pid for each in listening if each.pid and each.laddr and each.laddr.port == port)
    return psutil.Process(router), psutil.Process(asyncio.run(head()))


def _threads(process: psutil.Process) -> dict[int, float]:
    """Seconds of CPU that each thread has taken."""
    return {each.id: each.user_time + each.system_time for each in process.threads()}


def _spent(process: psutil.Process, before: dict[int, float]) -> dict[int, float]:
    """Seconds of CPU of each thread since ``before``."""
    return {thread: seconds - before.get(thread, 0.0) for thread, seconds in _threads(process).items()}


def deployment(workload: Workload, pool_bytes: int, model: str, port: int) -> Deployment:
    """One pipeline of one shard with the engine's threads and memory, behind a router at ``port``."""
    settings = {
        "model": model,
        "shards": 1,
        "threads": THREADS,
        "kv_bytes": pool_bytes,
        "max_sequences": max(8, workload.requests),
        "router_port": port,
        "compression": {"policy": "full"},
    }
    (application,) = DEFAULT_DEPLOYMENT["applications"]
    raw = DEFAULT_DEPLOYMENT | {"applications": [{**application, "args": settings}]}
    return Deployment(raw, parse_config(settings))


def main() -> None:
    """Prints the medians and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workload", default="W2", help=f"{', '.join(WORKLOADS)}, or sizes like 8x1024+64; default: W2"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=7, metavar="N")
    parser.add_argument("--prompts", type=int, default=200, metavar="N", help="lone ones of 32 tokens")
    parser.add_argument("--port", type=int, default=8700, metavar="N", help="of the router")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    log, workload = TurnLog(), named_workload(arguments.workload)
    config = EngineConfig(arguments.model, kv_bytes=256 << 20, max_sequences=max(8, workload.requests))
    engine = Engine(config, lambda configs: connect_local(configs, on_advance=log))
    work = requests(workload, engine.tokenizer, FULL)
    lone = requests(Workload(arguments.prompts, LONE.prompt, LONE.output), engine.tokenizer, FULL)
    deployed = deployment(workload, config.kv_bytes, arguments.model, arguments.port)
    with serving(deployed, "", say) as target:
        pairs = measure_pairs(target, engine, log, work, arguments.pairs)
        firsts = measure_first_tokens(target, engine, lone)
    costs = sorted(1 - pair.cluster / pair.process for pair in pairs)
    later = quantiles([(there - here) * 1e3 for there, here in firsts], n=4)
    print(
        f"{arguments.workload}: the path costs {median(costs):.1%} of the engine's tokens a second "
        f"({costs[0]:.1%} to {costs[-1]:.1%} in {len(pairs)} pairs); CPU a token: router "
        f"{median(pair.router_cpu for pair in pairs):.0f} µs, head "
        f"{median(pair.head_cpu for pair in pairs):.0f} µs\n"
        f"lone prompts of {LONE.prompt} tokens: the first token comes {later[1]:.1f} ms later "
        f"(quartiles {later[0]:.1f} and {later[2]:.1f}) than the "
        f"{median(here for _, here in firsts) * 1e3:.1f} ms of the engine alone, {len(firsts)} pairs"
    )
    if arguments.output:
        told = {"pairs": [vars(pair) for pair in pairs], "first_tokens": firsts}
        arguments.output.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
