"""What this processor can compute in."""

import torch


def multiplies_bf16() -> bool:
    """Whether this processor has bfloat16 instructions."""
    native = torch.cpu.get_capabilities()
    return bool(native.get("avx512_bf16") or native.get("amx_bf16"))
