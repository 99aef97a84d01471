"""kvpress' presses, and transformers' quantised cache; runs in its own venv."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from bench.peers.reading import Passage, Reading, ReadingJob, answer

# kvpress puts a key in the place of what a head has evicted that no query attends to: a few have one.
AT_ONCE = 8


def press_of(method: str, share: float) -> Any:
    """What is best of kvpress, by its own names; None where all tokens stay."""
    gone = 1 - share
    snapkv = kvpress.SnapKVPress(compression_ratio=gone)
    match method:
        case "kvzip":
            return kvpress.KVzipPress(compression_ratio=gone)
        case "kvzip+":
            return kvpress.KVzipPress(compression_ratio=gone, kvzip_plus_normalization=True)
        case "snapkv":
            return snapkv
        case "snapkv, adakv":
            return kvpress.AdaKVPress(snapkv)
        case "snapkv, criticaladakv":
            return kvpress.CriticalAdaKVPress(snapkv)
        case "expected_attention, adakv":
            return kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(compression_ratio=gone, epsilon=1e-2))
    return None


def read(job: ReadingJob) -> Iterator[Reading]:
    """Compresses each context, and reads what comes behind it, a few tokens at a time."""
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.precision), attn_implementation="sdpa"
    )
    for passage in job.passages:
        with torch.inference_mode():
            yield _read(model, job, passage)


def _read(model: Any, job: ReadingJob, passage: Passage) -> Reading:
    bits = {"int4": 4, "int2": 2}.get(job.method)
    cache = QuantizedCache("quanto", model.config, nbits=bits) if bits else DynamicCache()
    press = press_of(job.method, job.share)
    with press(model) if press else nullcontext():
        out = model(torch.tensor([passage.context]), past_key_values=cache, logits_to_keep=1)
    kept = _bytes(model, cache) / _whole_bytes(model, len(passage.context))
    behind, rows = [*passage.question, *passage.answer[:-1]], [out.logits[0]]
    for first in range(0, len(behind), AT_ONCE):
        some = torch.tensor([behind[first : first + AT_ONCE]])
        # Positions go on where the context ended, however much of it is left.
        positions = torch.arange(some.shape[1])[None] + len(passage.context) + first
        rows.append(model(some, past_key_values=cache, position_ids=positions).logits[0])
    logits = torch.cat(rows)[-len(passage.answer) :].float().log_softmax(-1)
    told = logits.gather(1, torch.tensor(passage.answer)[:, None])[:, 0]
    return Reading(told.tolist(), logits.argmax(-1).tolist(), kept)


def _bytes(model: Any, cache: Any) -> float:
    """What all layers hold, without what is hidden."""
    total = 0.0
    for layer, held in zip(model.model.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            quantised = getattr(held, f"_quantized_{name}", None)
            total += getattr(held, name).nbytes if quantised is None else _quantised_bytes(quantised)
        if (hidden := getattr(layer.self_attn, "masked_key_indices", None)) is not None:
            total -= len(hidden[0]) * 2 * held.keys.shape[-1] * held.keys.itemsize
    return total


def _quantised_bytes(tensor: Any) -> int:
    """Codes, scales and shifts."""
    codes = getattr(tensor._data, "_data", tensor._data)
    return int(codes.nbytes + tensor._scale.nbytes + tensor._shift.nbytes)


def _whole_bytes(model: Any, tokens: int) -> int:
    config = model.config
    return 2 * 2 * tokens * int(config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


if __name__ == "__main__":
    answer(read)
