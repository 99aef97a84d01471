"""Which floating point type a model computes in."""

import logging

import torch

logger = logging.getLogger(__name__)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that ``name``, one of DTYPES, stands for on ``device``.

    "auto" is bfloat16 where the hardware multiplies it, else float32 (float16 on a GPU): a CPU without
    bfloat16 instructions computes in it several times slower than in float32.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        chosen = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    else:
        native = torch.cpu.get_capabilities()
        chosen = torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") else torch.float32
    logger.info("dtype_chosen device=%s dtype=%s", device.type, str(chosen).removeprefix("torch."))
    return chosen
