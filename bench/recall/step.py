"""What evicted KV costs in likelihood while text goes on, and what recall at every step wins back."""

import argparse
import json
from pathlib import Path
from typing import Any

from pyramidserve.types import Compression
from workers.bench.likelihood import Judge
from workers.bench.texts import windows
from workers.engine.engine import Engine, EngineConfig


def main() -> None:
    """Prints a table and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--goes-on", type=int, default=256, metavar="TOKENS", help="behind each")
    parser.add_argument("--texts", type=int, default=6, metavar="N", help="of each length")
    parser.add_argument("--kv-keep", type=float, default=0.45)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    goes_on = arguments.goes_on
    engine = Engine(
        EngineConfig(dtype=arguments.dtype, kv_bytes=1 << 30, host_bytes=1 << 30, max_sequences=1)
    )
    judge = Judge(engine)
    modes = {"full": Compression()} | {
        mode: Compression("pyramid", "evict", arguments.kv_keep, recall=mode) for mode in ("off", "step")
    }
    results: list[dict[str, Any]] = []
    for tokens in arguments.prompts:
        runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
        for text in windows(engine.tokenizer, tokens + goes_on, arguments.texts):
            for mode, compression in modes.items():
                read = judge.read(text[:tokens], text[tokens:], compression)
                spilled = sum(layer.spilled for layer in read.receipt.layers)
                row_bytes = read.receipt.spilled_bytes / max(1, spilled)
                runs[mode].append(
                    {
                        "nll": -read.total / goes_on,
                        "device_share": read.receipt.kv_keep_reached,
                        "bytes_per_token": read.receipt.recalled_bytes / goes_on,
                        "of_spilled": read.receipt.recalled_bytes / goes_on / max(1, spilled * row_bytes),
                    }
                )
        for mode, own in runs.items():
            mean = {name: sum(run[name] for run in own) / len(own) for name in own[0]}
            full = sum(run["nll"] for run in runs["full"]) / len(own)
            worse = mean["nll"] / full - 1
            worst = max(run["nll"] / whole["nll"] - 1 for run, whole in zip(own, runs["full"], strict=True))
            results.append({"prompt_tokens": tokens, "recall": mode, "worse": worse, "runs": own})
            print(
                f"{tokens:5} tokens, {mode:4}: NLL {mean['nll']:.4f} ({worse:+.2%}, worst {worst:+.2%}), "
                f"{mean['device_share']:.3f} of KV on the device, {mean['bytes_per_token'] / 1e3:.0f} kB "
                f"a token from the host = {mean['of_spilled']:.1%} of what is there",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
