"""The events of a reply's stream, to and from their messages."""

from pyramidserve.errors import EngineError
from pyramidserve.types import (
    DeviceBytes,
    Event,
    FinishReason,
    LayerReceipt,
    Receipt,
    Started,
    TokenLogprob,
    Tokens,
)
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire.chat import parts_from_messages, parts_to_messages

_FINISH_REASON_TO_MESSAGE = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_REASON_FROM_MESSAGE = {value: reason for reason, value in _FINISH_REASON_TO_MESSAGE.items()}


def started_to_message(started: Started) -> pb.Started:
    """The message of ``started``."""
    return pb.Started(prompt_tokens=started.prompt_tokens, seed=started.seed)


def started_from_message(message: pb.Started) -> Started:
    """The event of ``message``."""
    return Started(prompt_tokens=message.prompt_tokens, seed=message.seed)


def tokens_to_message(tokens: Tokens) -> pb.Tokens:
    """The message of ``tokens``."""
    message = pb.Tokens(
        index=tokens.index,
        token_ids=tokens.token_ids,
        text=tokens.text,
        tool_calls=parts_to_messages(tokens.tool_calls),
    )
    for each in tokens.logprobs:
        message.logprobs.add(logprob=each.logprob, top_ids=each.top_ids, top_logprobs=each.top_logprobs)
    return message


def tokens_from_message(message: pb.Tokens) -> Tokens:
    """The event of ``message``."""
    logprobs = tuple(
        TokenLogprob(each.logprob, tuple(each.top_ids), tuple(each.top_logprobs))
        for each in message.logprobs
    )
    calls = parts_from_messages(message.tool_calls)
    return Tokens(message.index, tuple(message.token_ids), message.text, logprobs, calls)


def receipt_to_message(receipt: Receipt) -> pb.Receipt:
    """The message of ``receipt``."""
    return pb.Receipt(
        request_id=receipt.request_id,
        finish_reason=_FINISH_REASON_TO_MESSAGE[receipt.finish_reason],
        stop_string=receipt.stop_string,
        prompt_tokens=receipt.prompt_tokens,
        output_tokens=receipt.output_tokens,
        seed=receipt.seed,
        policy=receipt.policy,
        kv_keep_target=receipt.kv_keep_target,
        kv_keep_reached=receipt.kv_keep_reached,
        kv_keep_bound_by=receipt.kv_keep_bound_by,
        peak_device_bytes=pb.DeviceBytes(**vars(receipt.peak_device_bytes)),
        spilled_bytes=receipt.spilled_bytes,
        recalled_bytes=receipt.recalled_bytes,
        dropped_bytes=receipt.dropped_bytes,
        queue_seconds=receipt.queue_time,
        time_to_first_token_seconds=receipt.time_to_first_token,
        inter_token_p50_seconds=receipt.inter_token_p50,
        inter_token_p99_seconds=receipt.inter_token_p99,
        layers=[pb.LayerReceipt(**vars(layer)) for layer in receipt.layers],
        pipeline_id=receipt.pipeline_id,
        preemptions=receipt.preemptions,
        replays=receipt.replays,
        recall=receipt.recall,
        host_attended_bytes=receipt.host_attended_bytes,
        reused_tokens=receipt.reused_tokens,
        drafted_tokens=receipt.drafted_tokens,
        accepted_tokens=receipt.accepted_tokens,
        device_peak_bytes=receipt.device_peak_bytes,
        kv_bytes_keep_target=receipt.kv_bytes_keep_target,
        kv_bytes_keep_reached=receipt.kv_bytes_keep_reached,
    )


def receipt_from_message(message: pb.Receipt) -> Receipt:
    """The event of ``message``.

    Raises:
        EngineError: the finish reason is not set, or newer than this package.
    """
    if message.finish_reason not in _FINISH_REASON_FROM_MESSAGE:
        raise EngineError(f"the receipt has the unknown finish reason {message.finish_reason}")
    peak = message.peak_device_bytes
    return Receipt(
        request_id=message.request_id,
        finish_reason=_FINISH_REASON_FROM_MESSAGE[message.finish_reason],
        stop_string=message.stop_string,
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        seed=message.seed,
        policy=message.policy,
        kv_keep_target=message.kv_keep_target if message.HasField("kv_keep_target") else None,
        kv_keep_reached=message.kv_keep_reached,
        kv_keep_bound_by=message.kv_keep_bound_by,
        peak_device_bytes=DeviceBytes(peak.kv, peak.scores, peak.tables, peak.prefill_workspace),
        spilled_bytes=message.spilled_bytes,
        recalled_bytes=message.recalled_bytes,
        dropped_bytes=message.dropped_bytes,
        queue_time=message.queue_seconds,
        time_to_first_token=message.time_to_first_token_seconds,
        inter_token_p50=message.inter_token_p50_seconds,
        inter_token_p99=message.inter_token_p99_seconds,
        layers=tuple(
            LayerReceipt(
                layer=layer.layer,
                prompt_kept=layer.prompt_kept,
                generated_kept=layer.generated_kept,
                spilled=layer.spilled,
                dropped=layer.dropped,
                recalled=layer.recalled,
            )
            for layer in message.layers
        ),
        pipeline_id=message.pipeline_id,
        preemptions=message.preemptions,
        replays=message.replays,
        recall=message.recall,
        host_attended_bytes=message.host_attended_bytes,
        reused_tokens=message.reused_tokens,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        device_peak_bytes=message.device_peak_bytes,
        kv_bytes_keep_target=message.kv_bytes_keep_target
        if message.HasField("kv_bytes_keep_target")
        else None,
        kv_bytes_keep_reached=message.kv_bytes_keep_reached,
    )


def event_to_message(event: Event) -> pb.GenerateResponse:
    """The stream's message of ``event``."""
    match event:
        case Started():
            return pb.GenerateResponse(started=started_to_message(event))
        case Tokens():
            return pb.GenerateResponse(tokens=tokens_to_message(event))
        case Receipt():
            return pb.GenerateResponse(receipt=receipt_to_message(event))


def event_from_message(message: pb.GenerateResponse) -> Event:
    """The event of the stream's ``message``.

    Raises:
        EngineError: no event is set, or one newer than this package.
    """
    match message.WhichOneof("event"):
        case "started":
            return started_from_message(message.started)
        case "tokens":
            return tokens_from_message(message.tokens)
        case "receipt":
            return receipt_from_message(message.receipt)
        case None:
            raise EngineError("the server sent an unknown event")
