"""Checks and measures a GPU in one command: ``python -m bench.gpu.check --budget 420``.

What matters most comes first, every result is written when it is there, and no section stops another.
"""

import argparse
import logging
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.gpu.card import card
from bench.gpu.context import Context
from bench.gpu.kernels import kernels
from bench.gpu.moves import moves
from bench.gpu.throughput import CHAT, LONG, throughput
from bench.gpu.tokens import tokens
from pyramidserve.errors import PyramidServeError
from workers.device import open_device

RESULTS = Path(__file__).with_name("results")
SECTIONS = {
    "card": card,
    "kernels": kernels,
    "tokens": tokens,
    "moves": moves,
    "13b": throughput("llama-2-13b", CHAT),
    "7b": throughput("llama-2-7b", CHAT, LONG),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs all sections; 1 if any failed or found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to rehearse")
    parser.add_argument("--tiny", action="store_true", help="small models and sizes, for a rehearsal")
    parser.add_argument("--budget", type=float, default=420, metavar="SECONDS", help="default: 420")
    parser.add_argument(
        "--out", type=Path, help="where the results go; default: bench/gpu/results/CARD-DATE.json"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        device = open_device(options.device)
    except PyramidServeError as error:
        print(error.message)
        return 1
    out = options.out or RESULTS / f"{_name(device)}-{date.today().isoformat()}.json"
    context = Context(device, options.tiny, time.monotonic() + options.budget, out)
    context.results |= {"date": date.today().isoformat(), "device": str(device), "tiny": options.tiny}
    with torch.inference_mode():
        for name, section in SECTIONS.items():
            context.run(name, section)
            print(f"{name}: {describe(context.results[name])}", flush=True)
    print(f"results in {out}")
    return int(any(is_wrong(context.results[name]) for name in SECTIONS))


def is_wrong(section: dict[str, Any]) -> bool:
    """Whether a section failed, or found something that is not as it should be."""
    return "error" in section or section.get("ok") is False


def describe(section: dict[str, Any]) -> str:
    """How a section ended, in a line."""
    if "skipped" in section:
        return f"skipped, as {section['skipped']}"
    outcome = section.get("error") or section.get("cut_short") or ("WRONG" if is_wrong(section) else "done")
    return f"{outcome} in {section['seconds']} s"


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return "-".join(torch.cuda.get_device_name(device).lower().split())


if __name__ == "__main__":
    raise SystemExit(main())
