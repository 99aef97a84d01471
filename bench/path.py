"""What the path client → router → head costs beside the same engine in one process, in pairs, in turns.

The client speaks gRPC, or HTTP as OpenAI's clients do.

A Ray cluster is up on both sides. Everything shares this machine, the client too.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx2
import psutil
import torch

from bench.recall.turns import first_token
from cluster.commands.serve import say
from cluster.config import parse_config
from cluster.deploy.deployment import DEFAULT_DEPLOYMENT, Deployment
from cluster.deploy.serving import serving
from pyramidserve import AsyncClient, Tokens
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


class GrpcClient(AsyncClient):
    """Tokens and their times, by the SDK."""

    async def play(self, request: EngineRequest) -> tuple[int, float]:
        """Output tokens of a request, and when the first came."""
        count, first = 0, 0.0
        stream = self.stream(request.prompt, stopping=request.stopping, compression=FULL)
        async with stream as events:
            async for event in events:
                if isinstance(event, Tokens):
                    first = first or time.perf_counter()
                    count += len(event.token_ids)
        return count, first


class HttpClient(httpx2.AsyncClient):
    """The same, by server-sent events, which are not read beyond their first words but for the last."""

    def __init__(self, target: str) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        super().__init__(base_url=target, trust_env=False, timeout=None, limits=limits)

    async def play(self, request: EngineRequest) -> tuple[int, float]:
        """Output tokens of a request, and when the first came."""
        body = {
            "prompt": request.prompt,
            "max_tokens": request.stopping.max_tokens,
            "ignore_eos": request.stopping.ignore_eos,
            "compression": {"policy": "full"},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first, last = 0.0, ""
        async with self.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    first, last = first or time.perf_counter(), line
        usage = json.loads(last.removeprefix("data: "))["usage"]
        return int(usage["completion_tokens"]), first


@dataclass(frozen=True)
class Way:
    """How clients get in: one made of ``url``, at the router whose gRPC port is at ``target``."""

    client: Callable[[str], GrpcClient | HttpClient]
    url: str
    target: str


def measure_pairs(
    way: Way, engine: Engine, log: TurnLog, work: Sequence[EngineRequest], count: int
) -> list[Pair]:
    """Runs ``work`` ``count`` times each way, first one and then the other first."""
    pairs: list[Pair] = []
    router, head = _processes(way.target)
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
                sides[side], tokens = asyncio.run(_through_the_cluster(way, work))
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
    way: Way, engine: Engine, prompts: Sequence[EngineRequest]
) -> list[tuple[float, float]]:
    """Seconds to the first token of each lone prompt: through the cluster, and in this process."""

    async def through_the_cluster() -> list[tuple[float, float]]:
        times = []
        async with way.client(way.url) as client:

            async def ask(request: EngineRequest) -> float:
                began = time.perf_counter()
                return (await client.play(request))[1] - began

            for number, request in enumerate(prompts):
                if number % 2:
                    there = await ask(request)
                    here, *_ = first_token(engine, request)
                else:
                    here, *_ = first_token(engine, request)
                    there = await ask(request)
                times.append((there, here))
        return times

    return asyncio.run(through_the_cluster())


async def _through_the_cluster(way: Way, work: Sequence[EngineRequest]) -> tuple[float, int]:
    """Output tokens a second of all streams together, and how many tokens there were."""
    async with way.client(way.url) as client:
        began = time.perf_counter()
        played = await asyncio.gather(*(client.play(request) for request in work))
        tokens = sum(count for count, _ in played)
        return tokens / (time.perf_counter() - began), tokens


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


def deployment(workload: Workload, pool_bytes: int, model: str, port: int, http_port: int) -> Deployment:
    """One pipeline of one shard with the engine's threads and memory, behind a router at these ports."""
    settings = {
        "model": model,
        "shards": 1,
        "threads": THREADS,
        "kv_bytes": pool_bytes,
        "max_sequences": max(8, workload.requests),
        "router_port": port,
        "http_port": http_port,
        "metrics_port": 0,
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
    parser.add_argument("--wire", choices=("grpc", "http"), default="grpc", help="that clients speak")
    parser.add_argument("--port", type=int, default=8700, metavar="N", help="of the router")
    parser.add_argument("--http-port", type=int, default=8701, metavar="N")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    log, workload = TurnLog(), named_workload(arguments.workload)
    config = EngineConfig(arguments.model, kv_bytes=256 << 20, max_sequences=max(8, workload.requests))
    engine = Engine(config, lambda configs: connect_local(configs, on_advance=log))
    work = requests(workload, engine.tokenizer, FULL)
    lone = requests(Workload(arguments.prompts, LONE.prompt, LONE.output), engine.tokenizer, FULL)
    ports = arguments.port, arguments.http_port
    deployed = deployment(workload, config.kv_bytes, arguments.model, *ports)
    with serving(deployed, "", say) as target:
        way = Way(GrpcClient, target, target)
        if arguments.wire == "http":
            way = Way(HttpClient, f"http://127.0.0.1:{arguments.http_port}", target)
        pairs = measure_pairs(way, engine, log, work, arguments.pairs)
        firsts = measure_first_tokens(way, engine, lone)
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
