"""What is simulated: a model on devices, and how many pipelines of them."""

from dataclasses import dataclass
from itertools import pairwise

from cluster.partition import boundaries, layer_costs
from cluster.simulation.timing import Costs
from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, StageState
from workers.budget.kv_format import KV_FORMATS, KVFormat
from workers.engine.settings import EngineSettings
from workers.model.config import ModelConfig
from workers.model.shapes import SHAPES
from workers.model.work import Limits, weights_read

MODELS = {size: SHAPES[f"llama-2-{size}"] for size in ("7b", "13b", "70b")}
# The fewest GPUs of 80 GB that hold the weights and leave a third of their memory for KV.
SHARDS = {"7b": 1, "13b": 1, "70b": 3}
# The data sheet of an A100 with 80 GB: bytes and bf16 operations a second.
GPU, GPU_BYTES = Limits(2.0e12, 312e12), 80_000_000_000
# The type of KV that has as many bytes a number as weights.
PLAIN = {2: "bfloat16", 4: "float32"}
# What is not for weights and KV: activations, the runtime.
RESERVED = 0.1
# What servers reach of that: 70 % of the bandwidth, half of the operations.
USUAL = Costs(weights=1.4, kv=1.4, rows=2.0, prefill=2.0)


@dataclass(frozen=True)
class Scaling:
    """How the number of pipelines follows the demand; seconds as in ClusterConfig.

    Attributes:
        most: pipelines at most.
        start_seconds: until a new one serves.
    """

    most: int
    target_pressure: float = 0.8
    up_seconds: float = 2.0
    down_seconds: float = 60.0
    start_seconds: float = 60.0


@dataclass(frozen=True)
class Setup:
    """A cluster.

    Attributes:
        itemsize: bytes of a weight.
        shards: devices of a pipeline.
        limits, costs: of a device.
        pool_bytes: memory for KV of each device.
        pipelines: how many there are, or at least with ``scaling``.
        kv_dtype: of KV, one of KV_DTYPES; "auto" has as many bytes as a weight.
    """

    model: ModelConfig
    itemsize: int
    shards: int
    limits: Limits
    costs: Costs
    pool_bytes: int
    compression: Compression
    pipelines: int = 1
    scaling: Scaling | None = None
    max_sequences: int = 256
    max_prefill_tokens: int = EngineSettings.max_prefill_tokens
    queue_limit: int = 1024
    kv_dtype: str = "auto"

    @property
    def kv_format(self) -> KVFormat:
        """How KV is stored."""
        return KV_FORMATS[PLAIN[self.itemsize] if self.kv_dtype == "auto" else self.kv_dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one layer."""
        return self.kv_format.page_bytes(self.model.kv_heads, self.model.head_size)

    def stages(self) -> list[StageState]:
        """A pipeline's stages, idle."""
        cuts = boundaries(*layer_costs(self.model, self.compression, self.kv_format.name), self.shards)
        return [
            StageState(
                first_layer=first,
                end_layer=end,
                pid=0,
                node="",
                pages_total=self.pool_bytes // self.page_bytes,
                pages_in_use=0,
                pages_reserved=0,
                page_bytes=self.page_bytes,
                host_bytes=0,
                host_bytes_limit=0,
                workspace_bytes=0,
                resident_bytes=0,
                device_bytes=0,
                device_peak_bytes=0,
                kv_heads=self.model.kv_heads,
                kv_dtype=self.kv_format.name,
            )
            for first, end in pairwise((0, *cuts, self.model.layers))
        ]


def gpu_setup(
    model: str,
    shards: int,
    compression: Compression,
    costs: Costs,
    pipelines: int,
    scaling: Scaling | None,
    kv_dtype: str = "auto",
) -> Setup:
    """A cluster of 80 GB GPUs. Raises InvalidRequestError if ``shards`` of them cannot hold the model."""
    config, itemsize = MODELS[model], 2
    weights = (weights_read(config) + config.vocabulary * config.hidden) * itemsize
    pool = int((GPU_BYTES * (1 - RESERVED)) - weights / shards)
    if pool <= 0:
        raise InvalidRequestError(
            f"{shards} GPUs of {GPU_BYTES / 1e9:.0f} GB cannot hold the {weights / 1e9:.0f} GB of "
            f"{model}; give more --shards"
        )
    return Setup(
        *(config, itemsize, shards, GPU, costs, pool, compression, pipelines, scaling), kv_dtype=kv_dtype
    )
