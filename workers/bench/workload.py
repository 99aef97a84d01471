"""What the engine is measured with."""

import re
from dataclasses import dataclass
from pydoc_data.topics import topics

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression, Stopping
from workers.engine.engine import EngineRequest
from workers.model.config import ModelConfig
from workers.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Workload:
    """``requests`` at once, of ``prompt`` tokens each, answered with ``output`` tokens.

    ``kv_bytes`` is the KV memory that they share; 0 means enough for all of them, uncompressed.
    """

    requests: int
    prompt: int
    output: int
    kv_bytes: int = 0

    def pool_bytes(self, model: ModelConfig, itemsize: int, more: int = 0) -> int:
        """Bytes of the KV pool, with room for ``more`` tokens."""
        # A little more than the tokens take: pages are whole, and scores lie in them too.
        tokens = self.prompt + self.output + 64
        per_token = model.layers * 2 * model.kv_heads * model.head_size * itemsize
        return self.kv_bytes or (self.requests * tokens + more) * per_token


WORKLOADS = {
    "W1": Workload(1, 512, 128),
    "W2": Workload(16, 512, 128),
    "W3": Workload(8, 4096, 128),
    "W4": Workload(24, 4096, 128, 512 << 20),
}


def named_workload(name: str) -> Workload:
    """The workload of a name, or of sizes like ``8x1024+64``. Raises InvalidRequestError."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", name)
    if not sizes:
        raise InvalidRequestError(
            f"workload {name!r} is neither one of {', '.join(WORKLOADS)} nor REQUESTSxPROMPT+OUTPUT, "
            "as in 8x1024+64"
        )
    return Workload(*map(int, sizes.groups()))


# Streams that run while a prompt of so many tokens comes.
STREAMS, LATE_PROMPT = Workload(8, 512, 1024), 4096


def requests(workload: Workload, tokenizer: Tokenizer, compression: Compression) -> list[EngineRequest]:
    """English prompts of exact lengths, each of its own: the Python reference, which every Python has."""
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    starts = [
        index * (len(ids) - workload.prompt) // workload.requests for index in range(workload.requests)
    ]
    stopping = Stopping(workload.output, ignore_eos=True)
    return [
        EngineRequest(ids[start : start + workload.prompt], stopping=stopping, compression=compression)
        for start in starts
    ]
