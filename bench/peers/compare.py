"""Runs the workloads on this engine and on its peers in turns, and shows a table and a plot."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from bench.peers.job import Job, Result
from pyramidserve.types import Compression
from workers.bench.workload import WORKLOADS, requests
from workers.device import multiplies_bf16
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import read_config
from workers.model.tokenizer import Tokenizer

HOME = Path.home() / ".cache" / "pyramidserve-peers"
CPU = torch.device("cpu")
INSTALL = "bash bench/peers/install.sh"
ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
NOTE = (
    "Medians, with the spread of the runs over it. Ratio: of output tokens/s, to the best peer's. "
    "llama.cpp runs as many synthetic tokens. Prefill of a peer: until the last request's first token; "
    "a peer's KV is its pool, this engine's its peak."
)

Run = dict[str, Any]  # the fields of Result, and workload, engine and precision


@dataclass(frozen=True)
class Peer:
    """Another engine.

    Attributes:
        folder: what install.sh makes in HOME.
        model: in HOME, with a place for the precision.
        precisions: what it calls float32 and bfloat16, and the bytes of a KV element that go with them.
        kv_precision, keep_tokens: as in Job.
        environment: variables that it wants set.
        workloads: those that it can run.
    """

    folder: str
    model: str
    precisions: tuple[tuple[str, float], tuple[str, float]]
    python: Path
    kv_precision: str = ""
    keep_tokens: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    workloads: tuple[str, ...] = tuple(WORKLOADS)

    @property
    def installed(self) -> bool:
        """Whether install.sh got to the end of it."""
        return (HOME / self.folder / ".ready").exists()

    def run(self, workload_name: str) -> Run:
        """One run in a process of its own."""
        workload = WORKLOADS[workload_name]
        checkpoint = resolve_checkpoint(EMBEDDED)
        config = read_config(checkpoint)
        work = requests(workload, Tokenizer(checkpoint), Compression("full"))
        # Where bfloat16 is emulated, it was slower or refused.
        precision, itemsize = self.precisions[multiplies_bf16(CPU)]
        token_bytes = round(config.layers * 2 * config.kv_heads * config.head_size * itemsize)
        # The peers' blocks are of 128 tokens at most, and one may be their own.
        tokens = workload.requests * (workload.prompt + workload.output + 128) + 128
        threads = len(os.sched_getaffinity(0))
        job = Job(
            model=str(HOME / self.model.format(precision)),
            precision=precision,
            kv_precision=self.kv_precision,
            prompts=[cast(list[int], request.prompt) for request in work],
            output=workload.output,
            kv_bytes=workload.kv_bytes or tokens * token_bytes,
            kv_token_bytes=token_bytes,
            threads=threads,
            keep_tokens=self.keep_tokens,
        )
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": str(threads)}
        module = f"bench.peers.{self.folder.replace('.', '_')}_peer"
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(asdict(job), file)
            file.flush()
            command = [str(self.python), "-m", module, file.name]
            told: Run = json.loads(_output(command, environment))
        kv = f", KV {self.kv_precision}" if self.kv_precision else ""
        return {"precision": precision + kv} | told


def ours(*options: str) -> Callable[[str], Run]:
    """One run of this engine with ``options``, in a process of its own."""

    def run(workload_name: str) -> Run:
        command = Path(sys.executable).with_name("pyramidserve")
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            arguments = ["--workload", workload_name, "--repetitions", "1", "--json", file.name]
            _output([str(command), "bench", "engine", *arguments, *options], os.environ)
            told = json.loads(Path(file.name).read_text())
        told["kv_bytes"] = told["kv_bytes_peak"]
        return {"precision": told["dtype"]} | {name: told[name] for name in Result.__dataclass_fields__}

    return run


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    """What ``command`` prints; RuntimeError with its last words when it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _openvino(kv_precision: str = "", kv_itemsize: float = 2, keep_tokens: int = 0) -> Peer:
    return Peer(
        "openvino",
        "openvino-model",
        (("f32", kv_itemsize), ("bf16", kv_itemsize)),
        HOME / "openvino" / "bin" / "python",
        kv_precision,
        keep_tokens,
    )


PEERS = {
    "openvino": _openvino(),
    # A head's 64 numbers take a byte each, and 12 bytes for their scales.
    "openvino-u8": _openvino("u8", 76 / 64),
    "openvino-evict": _openvino(keep_tokens=1024),
    "vllm": Peer(
        "vllm",
        "checkpoint",
        (("float32", 4), ("bfloat16", 2)),
        HOME / "vllm" / "bin" / "python",
        environment={"LD_PRELOAD": str(HOME / "vllm" / "lib" / "libiomp5.so")},
    ),
    "llama.cpp": Peer(
        "llama.cpp",
        "llama.cpp/model-{}.gguf",
        (("f32", 2), ("bf16", 2)),
        Path(sys.executable),  # the peer is a binary
        workloads=("W1", "W2", "W3"),
    ),
}
OURS = {"full": ours("--policy", "full"), "prune": ours("--policy", "pyramid", "--kv-keep", "0.45")}


def table(runs: list[Run], workload_name: str) -> str:
    """The medians of one workload in Markdown."""
    groups = by_engine(runs, workload_name)
    speeds = {name: _median(group, "output_tokens_per_second") or 0 for name, group in groups.items()}
    best = max((speed for name, speed in speeds.items() if name in PEERS), default=0)
    workload = WORKLOADS[workload_name]
    heads = (
        *("engine", "precision", "output tok/s", "spread", "prefill tok/s", "decode tok/s"),
        *("TTFT p50 s", "inter-token p50 ms", "KV MiB", "peak RSS MiB", "ratio to best peer"),
    )
    lines = [
        f"{workload_name}: {workload.requests} x ({workload.prompt} + {workload.output}) tokens",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for name, group in groups.items():
        all_speeds = [run["output_tokens_per_second"] for run in group]
        cells = (
            name,
            group[-1]["precision"],
            f"**{speeds[name]:.1f}**",
            f"{(max(all_speeds) - min(all_speeds)) / speeds[name]:.0%} of {len(group)}",
            _cell(_median(group, "prefill_tokens_per_second"), ".0f"),
            _cell(_median(group, "decode_tokens_per_second"), ".1f"),
            _cell(_median(group, "ttft_p50"), ".2f"),
            _cell(_median(group, "inter_token_p50"), ".1f", 1000),
            _cell(_median(group, "kv_bytes"), ".0f", 1 / MEBIBYTE),
            _cell(_median(group, "peak_rss_bytes"), ".0f", 1 / MEBIBYTE),
            _cell(speeds[name] / best if best else None, ".2f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_engine(runs: list[Run], workload_name: str) -> dict[str, list[Run]]:
    """The runs of one workload, in the engines' order."""
    groups = {
        name: [run for run in runs if (run["workload"], run["engine"]) == (workload_name, name)]
        for name in (*PEERS, *OURS)
    }
    return {name: group for name, group in groups.items() if group}


def _median(group: list[Run], name: str) -> float | None:
    values = [run[name] for run in group if run[name] is not None]
    return median(values) if values else None


def _cell(value: float | None, style: str, factor: float = 1) -> str:
    return "" if value is None else format(value * factor, style)


def draw(runs: list[Run], file: Path) -> None:
    """Draws throughput against KV memory, a panel a workload."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    names = [name for name in WORKLOADS if by_engine(runs, name)]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, workload_name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        groups = by_engine(runs, workload_name)
        memory = {name: (_median(group, "kv_bytes") or 0) / MEBIBYTE for name, group in groups.items()}
        speed = {name: _median(group, "output_tokens_per_second") or 0 for name, group in groups.items()}
        for engine in groups:
            place, colour = (memory[engine], speed[engine]), f"C{[*PEERS, *OURS].index(engine)}"
            axes.plot(*place, "^" if engine in OURS else "o", color=colour)
            axes.annotate(engine, place, xytext=(5, 5), textcoords="offset points", color=colour)
        axes.set(title=workload_name, xlabel="KV memory, MiB", ylabel="output tokens/s")
        # From nought, with room for the names.
        axes.set(xlim=(0, 1.4 * max(memory.values())), ylim=(0, 1.2 * max(speed.values())))
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measures, adding to the runs that there are, and shows them all."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.compare", description=__doc__)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=["W2", "W3"])
    parser.add_argument("--engines", nargs="*", choices=[*PEERS, *OURS], default=[*PEERS, *OURS])
    parser.add_argument("--repetitions", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the runs are; new ones are added")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw speed against KV memory")
    arguments = parser.parse_args()
    runs: list[Run] = []
    if arguments.json and arguments.json.exists():
        runs = json.loads(arguments.json.read_text())
    # The machine's speed drifts: only engines that take turns can be compared.
    for number in range(arguments.repetitions):
        for workload_name in arguments.workloads:
            for name in arguments.engines:
                peer = PEERS.get(name)
                if peer and workload_name not in peer.workloads:
                    continue
                if peer and not peer.installed:
                    say(f"{name} skipped: not installed; run {INSTALL} {peer.folder}")
                    continue
                try:
                    told = peer.run(workload_name) if peer else OURS[name](workload_name)
                except RuntimeError as error:
                    say(f"{workload_name} {name} failed, {error}")
                    continue
                runs.append({"workload": workload_name, "engine": name, **told})
                say(f"{workload_name} {name} {number + 1}: {told['output_tokens_per_second']:.1f} tokens/s")
                if arguments.json:
                    arguments.json.write_text(json.dumps(runs, indent=1))
    for workload_name in WORKLOADS:
        if by_engine(runs, workload_name):
            print(table(runs, workload_name), end="\n\n")
    print(NOTE)
    if arguments.plot:
        draw(runs, arguments.plot)


def say(line: str) -> None:
    """Tells of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
