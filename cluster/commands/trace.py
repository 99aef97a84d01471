"""`pyramidserve trace`: what each layer keeps of one prompt, from the engine in this process."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.commands.chart import pyramid_chart
from cluster.commands.policy import (
    add_measured_arguments,
    add_policy_arguments,
    compression_here,
    use_measured,
)
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Stopping
from workers.budget.kv_format import KV_DTYPES
from workers.engine.engine import Engine, EngineConfig, EngineRequest, TracedReply
from workers.kv.entry import Positions
from workers.model.checkpoint import EMBEDDED
from workers.model.config import DTYPES

SUMMARY = "show what each layer keeps of a prompt (in this process)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--ids", type=Path, metavar="FILE", help="JSON list of token ids")
    prompt.add_argument("--text", type=Path, metavar="FILE", help="plain text")
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint; default: the embedded model")
    add_policy_arguments(parser, "pyramid")
    add_measured_arguments(parser)
    parser.add_argument("--recall", default="off", help="off (default), turn, step or exact")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES, help="of KV; default: --dtype")
    parser.add_argument("--kv-bytes", type=int, default=2 << 30, metavar="N", help="device memory for KV")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="greedy tokens, EOS ignored")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write positions, logits and output ids")
    parser.add_argument("--png", type=Path, metavar="OUT", help="draw the kept positions of every layer")


def run(arguments: argparse.Namespace) -> int:
    """Runs the prompt and shows, writes and draws what was kept."""
    use_measured(arguments)
    compression = compression_here(arguments, arguments.recall)
    if arguments.generate < 0:
        raise InvalidRequestError(f"--generate is {arguments.generate}; it must be 0 or more")
    prompt = _read_text(arguments.text) if arguments.text else read_ids(arguments.ids)
    engine = Engine(
        EngineConfig(
            checkpoint=arguments.model,
            dtype=arguments.dtype,
            kv_dtype=arguments.kv_dtype,
            kv_bytes=arguments.kv_bytes,
            host_bytes=arguments.kv_bytes,
            max_sequences=1,
        )
    )
    stopping = Stopping(max_tokens=max(1, arguments.generate), ignore_eos=True)
    (traced,) = engine.trace(
        [EngineRequest(prompt, stopping=stopping, compression=compression, trace=True)]
    )
    receipt = traced.reply.receipt
    print(pyramid_chart(receipt.layers))
    target = "" if receipt.kv_keep_target is None else f" of {receipt.kv_keep_target:.3f} asked for"
    target += (
        "" if receipt.kv_bytes_keep_target is None else f" ({receipt.kv_bytes_keep_target:g} of the bytes)"
    )
    bound = f", bound by the {receipt.kv_keep_bound_by}" if receipt.kv_keep_bound_by else ""
    print(
        f"{receipt.policy}: {receipt.prompt_tokens} prompt tokens, "
        f"{receipt.kv_keep_reached:.3f}{target} kept{bound}, in {receipt.kv_bytes_keep_reached:.3f} of the "
        "bytes in 16 bits"
    )
    if receipt.recall != "off":
        print(
            f"recall {receipt.recall}: {receipt.spilled_bytes} bytes spilled, {receipt.recalled_bytes} "
            f"recalled, {receipt.host_attended_bytes} attended to on the host; "
            f"{receipt.accepted_tokens} of {receipt.drafted_tokens} drafts right"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(trace_json(traced, arguments.generate, engine.model.kv_heads)))
    if arguments.png:
        draw(traced, arguments.png)
    return 0


def trace_json(traced: TracedReply, generate: int, kv_heads: int) -> dict[str, Any]:
    """What ``--json`` writes. What heads have is as it is after generation, where there was some."""
    assert traced.traced is not None
    result: dict[str, Any] = {
        "retained_positions_per_layer": retained_positions(traced),
        "retained_positions_per_layer_head": _of_heads(after_prefill(traced), kv_heads),
        "first_token_top8_ids": list(traced.traced.top.ids),
        "first_token_top8_logits": list(traced.traced.top.logits),
        "kv_keep_reached": traced.reply.receipt.kv_keep_reached,
        "kv_bytes_keep_reached": traced.reply.receipt.kv_bytes_keep_reached,
    }
    if generate:
        result["output_ids"] = list(traced.reply.token_ids)
        result["retained_positions_per_layer_head_after_prefill"] = result[
            "retained_positions_per_layer_head"
        ]
        # The last token is never fed back, so that it has no KV.
        result["retained_positions_per_layer_head"] = _of_heads(traced.positions, kv_heads)
    return result


def retained_positions(traced: TracedReply) -> list[list[int]]:
    """Per layer, the input positions that any of its heads has on the device after prefill, in order."""
    return [np.unique(positions).tolist() for positions in after_prefill(traced)]


def after_prefill(traced: TracedReply) -> list[Positions]:
    """Per layer of the model, what it has on the device after prefill."""
    assert traced.traced is not None
    return [positions for shard in traced.traced.shards for positions in shard.positions]


def _of_heads(layers: Sequence[Positions], kv_heads: int) -> list[list[list[int]]]:
    """Per layer and KV head, its positions."""
    return [np.broadcast_to(own, (kv_heads, own.shape[1])).tolist() for own in layers]


def draw(traced: TracedReply, file: Path) -> None:
    """Draws the kept positions, a row a layer."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    receipt = traced.reply.receipt
    layers = after_prefill(traced)
    kept = np.zeros((len(layers), receipt.prompt_tokens))
    for layer, positions in enumerate(layers):
        # The share of heads that have a token.
        np.add.at(kept[layer], positions, 1 / len(positions))
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(kept, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1.2)
    axes.set(
        xlabel="position in the prompt",
        ylabel="layer",
        title=f"{receipt.policy}: {receipt.kv_keep_reached:.1%} of the prompt's KV on the device",
    )
    figure.savefig(file, dpi=120)


def read_ids(file: Path) -> list[int]:
    """Reads a JSON list of token ids. Raises InvalidRequestError."""
    ids = _read_json(file)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InvalidRequestError(f"{file} must hold a JSON list of token ids")
    return ids


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read_text(file))
    except ValueError as error:
        raise InvalidRequestError(f"{file} is not JSON: {error}") from error
