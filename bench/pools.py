"""How many requests pools of several sizes serve, compressed or in fewer bits or not, saturated."""

import argparse
import json
import tempfile
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from cluster.commands.bench_serve import TRACE
from cluster.commands.serve import say
from cluster.deploy.deployment import Deployment, read_deployment
from cluster.deploy.serving import serving
from pyramidserve.cli import main as command
from workers.budget.kv_format import KV_DTYPES

CONFIG = Path(__file__).parent / "chat.yaml"
# A deployment file has a pool of so many sequences of the trace's mean length.
FULL_SEQUENCES = 4
KEYS, SERVED = ("pool", "policy", "kv_dtype"), "requests_per_second"
POLICIES = {
    "full": ["--policy", "full"],
    "pyramid": ["--policy", "pyramid", "--kv-keep", "0.45"],
}


def with_pool(deployment: Deployment, sequences: int, kv_dtype: str) -> Deployment:
    """The same with a pool of ``sequences`` full ones in 16 bits, whatever the type of KV."""
    kv_bytes = deployment.config.kv_bytes * sequences // FULL_SEQUENCES
    config = replace(deployment.config, kv_bytes=kv_bytes, kv_dtype=kv_dtype)
    raw = deepcopy(deployment.raw)
    raw["applications"][0]["args"] |= {"kv_bytes": kv_bytes, "kv_dtype": kv_dtype}
    return Deployment(raw, config)


def measure(
    target: str, model: str, trace: Path, policy: str, rate: float, seconds: float
) -> dict[str, Any]:
    """What `bench serve` tells of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        load = ["--trace", str(trace), "--model", model, "--rate", str(rate)]
        times = ["--seconds", str(seconds), "--warm-up", str(seconds / 4)]
        options = [*POLICIES[policy], *load, *times, "--json", str(out)]
        command(["bench", "serve", "--target", target, *options])
        (told,) = json.loads(out.read_text())
    del told["series"]
    return dict(told)


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draws requests a second, and the part of the pool in use, over its size."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(9, 4), layout="constrained")
    served, used = figure.subplots(1, 2)
    pools = sorted({each["pool"] for each in results})
    for policy, kv_dtype in dict.fromkeys((each["policy"], each["kv_dtype"]) for each in results):
        own = [each for each in results if (each["policy"], each["kv_dtype"]) == (policy, kv_dtype)]
        runs = [[each for each in own if each["pool"] == pool] for pool in pools]
        label, full = f"{policy}, {kv_dtype}", "pool_used_when_queued"
        served.plot(pools, [median(each[SERVED] for each in some) for some in runs], "o-", label=label)
        used.plot(
            pools, [100 * median(each[full] or 0 for each in some) for some in runs], "o-", label=label
        )
    served.set(ylabel="requests a second, saturated", ylim=(0, None))
    used.set(ylabel="pool in use while requests waited, %", ylim=(0, 100))
    for panel in (served, used):
        panel.set(xlabel="pool, in full sequences of the mean length", xscale="log")
        panel.set_xticks(pools, list(map(str, pools)))
        panel.minorticks_off()
        panel.legend()
    figure.savefig(file, dpi=110)


def compared(results: list[dict[str, Any]], first: str) -> list[str]:
    """How many requests each pool, policy and type of KV served beside the ``first`` type, in turns."""
    served = {(*(each[key] for key in KEYS), each["round"]): each[SERVED] for each in results}
    lines = []
    for pool, policy, kv_dtype in dict.fromkeys(key[:3] for key in served):
        if kv_dtype == first:
            continue
        rounds = [key[3] for key in served if key[:3] == (pool, policy, kv_dtype)]
        ratios = [served[pool, policy, kv_dtype, n] / served[pool, policy, first, n] for n in rounds]
        lines.append(
            f"pool {pool}, {policy}, {kv_dtype}: {median(ratios):.2f} times the requests/s of {first} at "
            f"the median of {len(ratios)} rounds ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return lines


def main() -> None:
    """Measures every pool under every policy, writes the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="default: chat.yaml")
    parser.add_argument("--trace", type=Path, default=TRACE, metavar="FILE", help="default: chat.json")
    parser.add_argument("--pools", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N")
    parser.add_argument("--kv-dtypes", nargs="+", default=["auto"], choices=KV_DTYPES, metavar="NAME")
    parser.add_argument("--rate", type=float, default=4.0, help="turns a second: more than can be served")
    parser.add_argument("--seconds", type=float, default=72.0)
    parser.add_argument("--repetitions", type=int, default=1, metavar="N", help="rounds of all, in turns")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    results = []
    for number, pool, kv_dtype in product(
        range(arguments.repetitions), arguments.pools, arguments.kv_dtypes
    ):
        deployment = with_pool(read_deployment(arguments.config), pool, kv_dtype)
        load = deployment.config.model, arguments.trace
        with serving(deployment, "", say) as target:
            for policy in POLICIES:
                told = measure(target, *load, policy, arguments.rate, arguments.seconds)
                known = {"round": number, "pool": pool, "kv_dtype": kv_dtype, "policy": policy}
                results.append(told | known)
    for line in compared(results, arguments.kv_dtypes[0]):
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
