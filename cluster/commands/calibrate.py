"""`pyramidserve calibrate`: how a model's layers share a budget, its gates, and which policies suit it."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from cluster.commands.serve import say
from pyramidserve.errors import InvalidRequestError
from workers.bench.cell import Cell
from workers.bench.facts import TALK_TOKENS, planted
from workers.bench.layers import LayerLosses
from workers.bench.repeated import REPEAT, Training
from workers.bench.texts import others
from workers.bench.trials import Trials
from workers.bench.workload import Workload
from workers.device import open_device
from workers.engine.choose import choose_dtype
from workers.engine.engine import Engine, EngineConfig
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import DTYPES, ModelConfig, read_config
from workers.model.tokenizer import Tokenizer
from workers.policies import defensive
from workers.policies.budget import Calibration, Trial, best_shares, read_calibration
from workers.policies.measured import use_budgets, use_gates
from workers.policies.settled import candidates

SUMMARY = (
    "measure how a model's layers best share what is kept, train its gates, and try which policies suit it "
    "(in this process)"
)
BUDGETS, POLICIES = PARTS = ("budgets", "policies")
# Of the facts that are planted; `bench quality` has others.
SEED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("model", help="checkpoint")
    parser.add_argument("--kv-keep", type=float, nargs="+", default=[0.45, 0.25, 0.12], metavar="SHARE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for `budgets` of a deployment")
    parser.add_argument(
        "--gates", type=Path, metavar="FILE", help="for `gates` of a deployment, which policy kvzap needs"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="of --out: how layers share what is kept; which policy `auto` takes, by the budgets that the "
        "file has; default: both",
    )
    for name, default, meaning in (
        ("--prompt", 1024, "tokens of a prompt"),
        ("--goes-on", 128, "tokens that are read behind it"),
        ("--texts", 4, "that are read for budgets, of what modules of Python say of themselves"),
        ("--talks", 8, "that are read for policies, and as many documents with facts, of others"),
        ("--gate-texts", 48, "that are read and repeated for gates"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning}; default: {default}"
        )
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Trains gates, shares budgets out, tries policies with both, and writes what was asked for."""
    kept = tuple(sorted(set(arguments.kv_keep)))
    _check(arguments, kept)
    torch.set_num_threads(arguments.threads)
    checkpoint = resolve_checkpoint(arguments.model, say)
    model = read_config(checkpoint)
    if arguments.gates is not None:
        _train(arguments, checkpoint, model)
        use_gates(str(arguments.gates))
    if arguments.out is not None:
        _measure(arguments, checkpoint, model, kept)
    return 0


def _check(arguments: argparse.Namespace, kept: tuple[float, ...]) -> None:
    """Raises InvalidRequestError where an option cannot be, whatever the model is."""
    if not 0 < kept[0] <= kept[-1] < 1:
        raise InvalidRequestError(
            f"--kv-keep is {' '.join(map(str, kept))}; each must be above 0 and below 1"
        )
    for name in ("prompt", "goes_on", "texts", "talks", "gate_texts", "threads"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise InvalidRequestError(f"{option} is {getattr(arguments, name)}; it must be 1 or more")
    if arguments.out is None and arguments.gates is None:
        raise InvalidRequestError(
            "neither --out nor --gates was given; name a file for what is measured, gates or both"
        )
    for option, file in (("--out", arguments.out), ("--gates", arguments.gates)):
        if file is not None and not file.parent.is_dir():
            raise InvalidRequestError(f"{option} is {file}; its folder must be there")


def _train(arguments: argparse.Namespace, checkpoint: Path, model: ModelConfig) -> None:
    """Writes gates."""
    if any(model.windows):
        raise InvalidRequestError(
            f"--gates was given, but layers of {arguments.model} have windows, which need the same tokens "
            "in all heads; leave it out"
        )
    tokenizer = Tokenizer(checkpoint)
    behind = len(tokenizer.encode_part(REPEAT)) + arguments.prompt + 1
    _check_context(arguments, model, behind, "what repeats it")
    texts = _texts(
        tokenizer, arguments.prompt, arguments.gate_texts, f"--gate-texts is {arguments.gate_texts}"
    )
    training = Training(_engine(arguments, checkpoint, model, Workload(1, arguments.prompt, behind)))
    training.read(texts, say)
    gates = training.gates()
    gates.write(arguments.gates)
    say(f"{arguments.gates} has the gates of models with {gates.model}")


def _measure(
    arguments: argparse.Namespace, checkpoint: Path, model: ModelConfig, kept: tuple[float, ...]
) -> None:
    """Writes budgets, and what policies leave with these."""
    tries = POLICIES in arguments.parts
    if BUDGETS not in arguments.parts:
        known = read_calibration(arguments.out)
        if known.model != model.fingerprint:
            raise InvalidRequestError(
                f"--out is {arguments.out}, which has the budgets of models with {known.model}, and "
                f"{arguments.model} has {model.fingerprint}; give another file, or --parts {BUDGETS}"
            )
    # Questions and answers about a document come behind it.
    behind = max(arguments.goes_on, TALK_TOKENS if tries else 0)
    _check_context(arguments, model, behind, "questions", f", or --parts {BUDGETS}")
    wanted = arguments.texts + 2 * arguments.talks * tries
    asked = f"--texts is {arguments.texts} and --talks {arguments.talks}"
    texts = _texts(Tokenizer(checkpoint), arguments.prompt + arguments.goes_on, wanted, asked)
    room = Workload(max(arguments.texts, arguments.talks), arguments.prompt, behind)
    engine = _engine(arguments, checkpoint, model, room)
    if BUDGETS in arguments.parts:
        known = _budgets(engine, texts[: arguments.texts], arguments.prompt, kept)
        known.write(arguments.out)
    if tries:
        use_budgets(str(arguments.out))
        trials = tuple(_tried(engine, texts[arguments.texts :], arguments.prompt, kept))
        replace(known, trials=trials).write(arguments.out)
    say(f"{arguments.out} has the {' and '.join(arguments.parts)} of models with {model.fingerprint}")


def _check_context(
    arguments: argparse.Namespace, model: ModelConfig, behind: int, what: str, way: str = ""
) -> None:
    if arguments.prompt + behind > model.context:
        raise InvalidRequestError(
            f"--prompt and --goes-on, or {what}, are {arguments.prompt + behind} tokens; the context of "
            f"{arguments.model} is {model.context}: give less{way}"
        )


def _texts(tokenizer: Tokenizer, tokens: int, wanted: int, asked: str) -> list[list[int]]:
    """So many texts of so many tokens."""
    texts = others(tokenizer, tokens, wanted)
    if len(texts) < wanted:
        raise InvalidRequestError(
            f"{asked}; the standard library here has {len(texts)} texts for them: give less"
        )
    return texts


def _engine(
    arguments: argparse.Namespace, checkpoint: Path, model: ModelConfig, workload: Workload
) -> Engine:
    """With room for a workload."""
    dtype = choose_dtype(arguments.dtype, open_device(arguments.device))
    room = workload.pool_bytes(model, dtype.itemsize)
    return Engine(
        EngineConfig(
            str(checkpoint),
            dtype=str(dtype).removeprefix("torch."),
            device=arguments.device,
            kv_bytes=room,
            host_bytes=room,
            max_sequences=workload.requests,
        )
    )


def _budgets(
    engine: Engine, texts: Sequence[Sequence[int]], prompt: int, kept: tuple[float, ...]
) -> Calibration:
    """How layers best share each of ``kept``."""
    curves = LayerLosses(engine, texts, prompt, defensive.POLICY.name).measure(_measured(kept), say)
    weights = []
    for share in kept:
        best = best_shares(curves, share)
        weights.append(tuple(round(each / mean(best), 3) for each in best))
    return Calibration(engine.model.fingerprint, kept, tuple(weights))


def _tried(
    engine: Engine, texts: Sequence[Sequence[int]], prompt: int, kept: tuple[float, ...]
) -> Iterator[Trial]:
    """What each candidate leaves at each share; facts are planted in the second half of ``texts``."""
    half = len(texts) // 2
    losses = LayerLosses(engine, texts[:half], prompt, defensive.POLICY.name)
    held = planted([text[:prompt] for text in texts[half:]], engine.tokenizer, SEED)
    trials = Trials(engine, losses, held, prompt)
    for share in _measured(kept)[1:]:
        for policy in candidates(engine.model):
            trial = trials.measure(policy, share)
            facts = "no facts" if trial.facts is None else f"{trial.facts:.3f} of the facts"
            say(f"{Cell(policy, share=share).name} leaves {trial.text:.3f} of the text, {facts}")
            yield trial


def _measured(kept: tuple[float, ...]) -> tuple[float, ...]:
    """Shares that are tried: less than those that are wanted, these, and more."""
    return (kept[0] / 2, *kept, (kept[-1] + 1) / 2)
