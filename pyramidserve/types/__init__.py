"""The nouns of a request and its reply, shared by clients and servers."""

from pyramidserve.types.compression import Compression, Parameter, Recall
from pyramidserve.types.constraint import Constraint
from pyramidserve.types.event import Event, Started, TokenLogprob, Tokens
from pyramidserve.types.message import ChatMessage, Role
from pyramidserve.types.priority import Priority
from pyramidserve.types.receipt import DeviceBytes, FinishReason, LayerReceipt, Receipt
from pyramidserve.types.reply import Reply
from pyramidserve.types.sampling import Sampling
from pyramidserve.types.state import ClusterState, PipelineState, StageState
from pyramidserve.types.stopping import Stopping

__all__ = [
    "ChatMessage",
    "ClusterState",
    "Compression",
    "Constraint",
    "DeviceBytes",
    "Event",
    "FinishReason",
    "LayerReceipt",
    "Parameter",
    "PipelineState",
    "Priority",
    "Recall",
    "Receipt",
    "Reply",
    "Role",
    "Sampling",
    "StageState",
    "Started",
    "Stopping",
    "TokenLogprob",
    "Tokens",
]
