"""The messages carry all that the dataclasses say, and only numbers that fit."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from scripted_inference import STATE, receipt

from pyramidserve import wire
from pyramidserve.errors import (
    EngineError,
    InvalidRequestError,
)
from pyramidserve.integers import whole_number
from pyramidserve.types import (
    ClusterState,
    Compression,
    Parameter,
    PipelineState,
    Receipt,
    Sampling,
    StageState,
    Started,
    Stopping,
    Tokens,
)
from pyramidserve.v1 import inference_pb2 as pb

KNOBS = st.dictionaries(
    st.text(max_size=5),
    st.booleans()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    max_size=3,
)
BIASES = st.dictionaries(st.integers(0, 2**31 - 1), st.floats(allow_nan=False), max_size=3)
PLAIN: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**31 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    dict[str, int]: st.dictionaries(st.text(max_size=5), st.integers(0, 2**63 - 1), max_size=3),
    Mapping[int, float]: BIASES,
    tuple[tuple[int, float], ...]: BIASES.map(lambda biases: tuple(biases.items())),
    Mapping[str, Parameter]: KNOBS,
    tuple[tuple[str, Parameter], ...]: KNOBS.map(lambda knobs: tuple(knobs.items())),
}


def anything(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that the nouns of a request are made of."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, types.UnionType):
        return st.one_of([st.none() if arm is type(None) else anything(arm) for arm in get_args(kind)])
    if get_origin(kind) in (tuple, Sequence):
        return st.lists(anything(get_args(kind)[0]), max_size=3).map(tuple)
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    assert isinstance(kind, type)
    return st.builds(kind, **{name: anything(hint) for name, hint in get_type_hints(kind).items()})


def compression_and_nothing_else(message: pb.Compression) -> Compression:
    return wire.compression_from_message(message, Compression(policy="", prefill="", recall=""))


def sent(message: Message) -> Any:
    """What arrives of ``message``."""
    return type(message).FromString(message.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "to_message", "from_message"),
    [
        (Sampling, wire.sampling_to_message, wire.sampling_from_message),
        (Stopping, wire.stopping_to_message, wire.stopping_from_message),
        (Compression, wire.compression_to_message, compression_and_nothing_else),
        (Started, wire.started_to_message, wire.started_from_message),
        (Tokens, wire.tokens_to_message, wire.tokens_from_message),
        (Receipt, wire.receipt_to_message, wire.receipt_from_message),
        (StageState, wire.stage_state_to_message, wire.stage_state_from_message),
        (PipelineState, wire.pipeline_state_to_message, wire.pipeline_state_from_message),
        (ClusterState, wire.cluster_state_to_message, wire.cluster_state_from_message),
        (Started | Tokens | Receipt, wire.event_to_message, wire.event_from_message),
    ],
)
@given(data=st.data())
def test_what_is_sent_arrives(
    kind: Any,
    to_message: Callable[[Any], Message],
    from_message: Callable[[Any], object],
    data: st.DataObject,
) -> None:
    value = data.draw(anything(kind))
    assert from_message(sent(to_message(value))) == value


def test_large_and_negative_numbers_arrive() -> None:
    huge = receipt("r", 5)
    assert wire.receipt_from_message(sent(wire.receipt_to_message(huge))) == huge
    assert wire.cluster_state_from_message(sent(wire.cluster_state_to_message(STATE))) == STATE
    seeded = Sampling(seed=-(2**63))
    assert wire.sampling_from_message(sent(wire.sampling_to_message(seeded))) == seeded


def test_absent_messages_are_the_defaults() -> None:
    request = pb.GenerateRequest()
    default = Compression("pyramid", "evict", kv_keep=0.5)
    assert wire.sampling_from_message(request.sampling) == Sampling()
    assert wire.stopping_from_message(request.stopping) == Stopping()
    assert wire.compression_from_message(request.compression, default) == default


def test_not_a_number_reaches_the_validation_of_the_server() -> None:
    sampling = wire.sampling_from_message(sent(wire.sampling_to_message(Sampling(math.nan))))
    assert math.isnan(sampling.temperature)
    message = sent(wire.compression_to_message(Compression(kv_keep=math.nan)))
    kv_keep = wire.compression_from_message(message, Compression()).kv_keep
    assert kv_keep is not None
    assert math.isnan(kv_keep)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.Compression(recall="off"), Compression("pyramid", "evict", kv_keep=0.5)),
        (pb.Compression(policy="full"), Compression("full", recall="turn")),
        (pb.Compression(policy="pyramid", prefill="prune"), Compression("pyramid", "prune", recall="turn")),
        (pb.Compression(prefill="prune"), Compression("pyramid", "prune", kv_keep=0.5, recall="turn")),
        (pb.Compression(kv_keep=0.1), Compression("pyramid", "evict", kv_keep=0.1, recall="turn")),
        (
            pb.Compression(kv_bytes_keep=0.1),
            Compression("pyramid", "evict", recall="turn", kv_bytes_keep=0.1),
        ),
        (
            pb.Compression(policy="auto", kv_bytes_keep=0.25),
            Compression("auto", recall="turn", kv_bytes_keep=0.25),
        ),
        (
            pb.Compression(pyramid=pb.PyramidParameters(min_context_length=0)),
            Compression("pyramid", "evict", recall="turn", parameters={"min_context_length": 0}),
        ),
        (
            pb.Compression(policy="streaming", streaming=pb.StreamingParameters(window=9)),
            Compression("streaming", recall="turn", parameters={"window": 9}),
        ),
    ],
)
def test_compression_takes_from_the_default_what_it_leaves_open(
    message: pb.Compression, expected: Compression
) -> None:
    default = Compression("pyramid", "evict", kv_keep=0.5, recall="turn")
    assert wire.compression_from_message(message, default) == expected


def test_a_share_of_bytes_is_that_of_the_default_until_a_request_says_how_much() -> None:
    default = Compression("auto", recall="turn", kv_bytes_keep=0.25)
    for older in (pb.Compression(), pb.Compression(recall="off"), pb.Compression(prefill="evict")):
        told = wire.compression_from_message(older, default)
        assert (told.policy, told.kv_keep, told.kv_bytes_keep) == ("auto", None, 0.25)
    by_tokens = wire.compression_from_message(pb.Compression(kv_keep=0.5), default)
    assert by_tokens == Compression("auto", kv_keep=0.5, recall="turn")


def test_routers_that_do_not_tell_of_bytes_are_understood() -> None:
    older = wire.receipt_to_message(replace(receipt("r", 5), kv_bytes_keep_target=None))
    older.ClearField("kv_bytes_keep_reached")
    told = wire.receipt_from_message(sent(older))
    assert (told.kv_bytes_keep_target, told.kv_bytes_keep_reached) == (None, 0)


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda: wire.sampling_to_message(Sampling(top_k=2**31)), "top_k .* not 2147483648"),
        (lambda: wire.sampling_to_message(Sampling(seed=2**63)), "seed .* not 9223372036854775808"),
        (lambda: wire.stopping_to_message(Stopping(max_tokens=-1)), "max_tokens .* not -1"),
        (
            lambda: wire.compression_to_message(Compression(parameters={"window": None})),  # type: ignore
            "window is None",
        ),
        (lambda: whole_number("each id", 1.5), "each id .* not 1.5"),  # type: ignore[arg-type]
    ],
)
def test_numbers_that_do_not_fit_are_named(convert: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        convert()


def test_events_of_a_newer_server_are_refused() -> None:
    with pytest.raises(EngineError, match="unknown event"):
        wire.event_from_message(pb.GenerateResponse())
    with pytest.raises(EngineError, match="finish reason 0"):
        wire.receipt_from_message(pb.Receipt())
