"""The sizes of models that are known by name. Pure."""

from dataclasses import replace

from workers.model.config import ModelConfig


def _llama_2(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden // heads,
        intermediate=intermediate,
        vocabulary=32_000,
        norm_epsilon=1e-5,
        attention_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        context=8192,
        eos_ids=(2,),
        dtype="bfloat16",
    )


SHAPES = {
    # Llama 2 (arXiv 2307.09288, table 1), with twice its context: prompts of 4,096 get answers.
    "llama-2-7b": _llama_2(32, 4096, 32, 32, 11_008),
    "llama-2-13b": _llama_2(40, 5120, 40, 40, 13_824),
    "llama-2-70b": _llama_2(80, 8192, 64, 8, 28_672),
    # Of the least that has heads in groups, of a size that kernels have, and every byte as a token.
    "toy": replace(_llama_2(6, 256, 4, 2, 512), vocabulary=259, context=4096, dtype="float32"),
}
