"""`pyramidserve calibrate`: how a model's layers best share a budget, for policies to use."""

import argparse
from pathlib import Path
from statistics import mean

import torch

from cluster.commands.serve import say
from pyramidserve.errors import InvalidRequestError
from workers.bench.layers import LayerLosses
from workers.bench.texts import others
from workers.bench.workload import Workload
from workers.device import open_device
from workers.engine.choose import choose_dtype
from workers.engine.engine import Engine, EngineConfig
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import DTYPES, read_config
from workers.model.tokenizer import Tokenizer
from workers.policies import defensive
from workers.policies.budget import Calibration, best_shares

SUMMARY = "measure how a model's layers best share what is kept (in this process)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", help="checkpoint")
    parser.add_argument("--kv-keep", type=float, nargs="+", default=[0.45, 0.25, 0.12], metavar="SHARE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="for `budgets` of a deployment"
    )
    for name, default, meaning in (
        ("--prompt", 1024, "tokens of a prompt"),
        ("--goes-on", 128, "tokens that are read behind it"),
        ("--texts", 4, "that are read, of what modules of Python say of themselves"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning}; default: {default}"
        )
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Measures each layer, shares budgets out by that, and writes them."""
    kept = tuple(sorted(set(arguments.kv_keep)))
    if not 0 < kept[0] <= kept[-1] < 1:
        raise InvalidRequestError(
            f"--kv-keep is {' '.join(map(str, kept))}; each must be above 0 and below 1"
        )
    for name in ("prompt", "goes_on", "texts", "threads"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequestError(f"{option} is {getattr(arguments, name)}; it must be 1 or more")
    if not arguments.out.parent.is_dir():
        raise InvalidRequestError(f"--out is {arguments.out}; its folder must be there")
    torch.set_num_threads(arguments.threads)
    checkpoint = resolve_checkpoint(arguments.model, say)
    model, tokens = read_config(checkpoint), arguments.prompt + arguments.goes_on
    if tokens > model.context:
        raise InvalidRequestError(
            f"--prompt and --goes-on are {tokens} tokens; the context of {arguments.model} is "
            f"{model.context}: give less"
        )
    texts = others(Tokenizer(checkpoint), tokens, arguments.texts)
    if len(texts) < arguments.texts:
        raise InvalidRequestError(
            f"--texts is {arguments.texts}; the standard library here has {len(texts)}: give less"
        )
    dtype = choose_dtype(arguments.dtype, open_device(arguments.device))
    room = Workload(len(texts), arguments.prompt, arguments.goes_on).pool_bytes(model, dtype.itemsize)
    engine = Engine(
        EngineConfig(
            str(checkpoint),
            dtype=str(dtype).removeprefix("torch."),
            device=arguments.device,
            kv_bytes=room,
            host_bytes=room,
            max_sequences=len(texts),
        )
    )
    losses = LayerLosses(engine, texts, arguments.prompt, defensive.POLICY.name)
    curves = losses.measure(_measured(kept), say)
    weights = []
    for share in kept:
        best = best_shares(curves, share)
        weights.append(tuple(round(each / mean(best), 3) for each in best))
    Calibration(model.fingerprint, kept, tuple(weights)).write(arguments.out)
    say(f"{arguments.out} has the budgets of models with {model.fingerprint}")
    return 0


def _measured(kept: tuple[float, ...]) -> tuple[float, ...]:
    """Shares that each layer alone is to keep: those that are wanted, less, and more."""
    return (kept[0] / 2, *kept, (kept[-1] + 1) / 2)
