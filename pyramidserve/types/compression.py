"""How the KV cache of a request is compressed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Recall = Literal["off", "turn", "step", "exact"]
# The value of a policy's knob; numbers may be one for each layer.
Parameter = bool | float | str | Sequence[float]


@dataclass(frozen=True)
class Compression:
    """How the KV cache of one request is compressed.

    Attributes:
        policy: what stays on the device: "full", "local", "streaming", "pyramid", "h2o", "scissorhands",
            "snapkv", "tova", "keydiff", "expected_attention", or another deployed one; "auto": what was
            measured best of the model where as much stays.
        prefill: with "pyramid": "prune", the usual, drops hidden states as PyramidInfer does, "evict"
            computes the full prefill and spills what it evicts to host memory. "": the policy's usual.
        kv_keep: fraction of the prompt's KV, summed over layers, to leave on the device after prefill,
            in (0, 1]; excludes ``parameters`` that say how much stays.
        recall: when evicted KV comes back from host memory: "off"; "turn", when a session goes on;
            "step", also while tokens are generated; "exact", so that the reply is the full cache's.
        parameters: the policy's own knobs, by the names of its authors, obeyed exactly; and with any policy
            ``tokens`` to keep in each layer, a number or a list of one for each, in place of ``kv_keep``.
        kv_bytes_keep: in place of ``kv_keep``: fraction, in (0, 1], of the bytes that all the prompt's KV
            would take in 16 bits. The deployment's ``kv_dtype`` says how many tokens that comes to; where
            all take fewer bytes, all stay.
    """

    policy: str = "full"
    prefill: str = ""
    kv_keep: float | None = None
    recall: str = "off"
    parameters: Mapping[str, Parameter] | tuple[tuple[str, Parameter], ...] = ()
    kv_bytes_keep: float | None = None

    def __post_init__(self) -> None:
        """Makes ``parameters`` pairs in order of their names, so that equals are equal and have a hash."""
        pairs = sorted(dict(self.parameters).items())
        values = ((name, tuple(each) if isinstance(each, list) else each) for name, each in pairs)
        object.__setattr__(self, "parameters", tuple(values))
