"""Conversions between the generated messages and the dataclasses of ``pyramidserve.types``."""

from pyramidserve.wire.chat import chat_from_message, chat_to_message, messages_from_chat
from pyramidserve.wire.error import error_from_rpc, error_to_metadata
from pyramidserve.wire.reply import (
    event_from_message,
    event_to_message,
    receipt_from_message,
    receipt_to_message,
    started_from_message,
    started_to_message,
    tokens_from_message,
    tokens_to_message,
)
from pyramidserve.wire.request import (
    compression_from_message,
    compression_to_message,
    constraint_from_message,
    constraint_to_message,
    priority_from_message,
    priority_to_message,
    sampling_from_message,
    sampling_to_message,
    stopping_from_message,
    stopping_to_message,
)
from pyramidserve.wire.state import (
    cluster_state_from_message,
    cluster_state_to_message,
    pipeline_state_from_message,
    pipeline_state_to_message,
    stage_state_from_message,
    stage_state_to_message,
)

__all__ = [
    "chat_from_message",
    "chat_to_message",
    "cluster_state_from_message",
    "cluster_state_to_message",
    "compression_from_message",
    "compression_to_message",
    "constraint_from_message",
    "constraint_to_message",
    "error_from_rpc",
    "error_to_metadata",
    "event_from_message",
    "event_to_message",
    "messages_from_chat",
    "pipeline_state_from_message",
    "pipeline_state_to_message",
    "priority_from_message",
    "priority_to_message",
    "receipt_from_message",
    "receipt_to_message",
    "sampling_from_message",
    "sampling_to_message",
    "stage_state_from_message",
    "stage_state_to_message",
    "started_from_message",
    "started_to_message",
    "stopping_from_message",
    "stopping_to_message",
    "tokens_from_message",
    "tokens_to_message",
]
