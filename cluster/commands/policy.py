"""The options that say what stays on the device, as commands have them."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Parameter, Recall
from workers.policies.measured import use_budgets, use_gates
from workers.policies.registry import BUILT_IN, enable, keeps_all, says_how_much

USUAL_KEEP = 0.45


def add_policy_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Declares them; without a ``default`` policy it is the deployment's."""
    names = ", ".join(policy.name for policy in BUILT_IN)
    prefills = {prefill: policy.name for policy in BUILT_IN for prefill in policy.prefills}
    choices = ", ".join(f"{prefill} ({name})" for prefill, name in prefills.items())
    parser.add_argument(
        "--policy",
        default=default,
        metavar="NAME",
        help=f"{names}; auto, what was measured best; or one of another package; default: "
        f"{default or 'the one of the deployment'}",
    )
    parser.add_argument("--prefill", default="", metavar="HOW", help=f"{choices}; default: the first")
    parser.add_argument("--kv-keep", type=float, metavar="SHARE", help="of the prompt's KV")
    parser.add_argument(
        "--kv-bytes-keep", type=float, metavar="SHARE", help="of the bytes that all its KV takes in 16 bits"
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help="JSON object of the policy's knobs")


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the files that `pyramidserve calibrate` writes, for commands with engines of their own."""
    for name, meaning in (("--budgets", "how its layers share a budget"), ("--gates", "for kvzap")):
        parser.add_argument(
            name, default="", metavar="FILE", help=f"of `calibrate` for the model, {meaning}"
        )


def use_measured(arguments: argparse.Namespace) -> None:
    """Takes them in. Raises ConfigurationError where one cannot be read."""
    use_budgets(arguments.budgets)
    use_gates(arguments.gates)


def compression_of(arguments: argparse.Namespace, recall: Recall = "off") -> Compression:
    """What was asked for; the deployment may have policies that are not here."""
    parameters = read_parameters(arguments.params) if arguments.params else {}
    return Compression(
        *(arguments.policy, arguments.prefill, arguments.kv_keep, recall, parameters),
        kv_bytes_keep=arguments.kv_bytes_keep,
    )


def compression_here(arguments: argparse.Namespace, recall: Recall = "off") -> Compression:
    """What was asked for, in this process. Raises ConfigurationError where there is no such policy."""
    enable([arguments.policy], "--policy is")
    return compression_of(arguments, recall)


def kept_at_most(compression: Compression) -> Compression:
    """With the usual share of the prompt's KV, unless it says another, or knobs, or keeps all."""
    if says_how_much(compression) or keeps_all(compression):
        return compression
    return replace(compression, kv_keep=USUAL_KEEP)


def read_parameters(file: Path) -> dict[str, Parameter]:
    """A policy's knobs by their names. Raises InvalidRequestError where there is no such object."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{file} has no JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{file} has {type(values).__name__}; it must be an object of knobs")
    return values
