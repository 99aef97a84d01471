"""What a sequence took, told when it has ended. Pure."""

from collections.abc import Sequence
from itertools import pairwise

from pyramidserve.types import DeviceBytes, Receipt
from workers.budget.kv_share import KVShare
from workers.budget.released import ReleasedSequence
from workers.percentile import percentile
from workers.policies.registry import policy_name, recall
from workers.schedule.sequence import RunningSequence


def receipt(sequence: RunningSequence, shards: Sequence[ReleasedSequence], shares: KVShare) -> Receipt:
    """What a sequence took that has come to its end, from what every shard reports.

    ``shares``: what tokens take of their bytes in 16 bits.
    """
    assert sequence.finish_reason is not None
    request = sequence.request
    kept = sum(layer.prompt_kept for shard in shards for layer in shard.layers)
    keep, all_layers = sequence.plan, len(request.prompt_ids) * len(sequence.plan.kept)
    # What a turn finds of those before it is known only to the shards.
    kept_share = (kept if sequence.reused else sum(keep.kept)) / all_layers
    new_times = sequence.token_times[len(request.forced_output_ids) :]
    gaps = [b - a for a, b in pairwise(new_times)]
    return Receipt(
        request_id=request.request_id,
        finish_reason=sequence.finish_reason,
        stop_string=sequence.detokenizer.stop_string,
        prompt_tokens=len(request.prompt_ids),
        output_tokens=len(sequence.output_ids),
        seed=request.sampling.seed or 0,
        policy=policy_name(request.compression),
        kv_keep_target=request.compression.kv_keep,
        kv_keep_reached=kept_share if sequence.reused else keep.fraction,
        kv_keep_bound_by=keep.bound_by,
        peak_device_bytes=DeviceBytes(
            kv=sum((s.peak_pages - s.score_pages) * s.page_bytes for s in shards),
            scores=sum(s.score_pages * s.page_bytes for s in shards),
            tables=sum(s.table_bytes for s in shards),
            prefill_workspace=sum(s.workspace_bytes for s in shards),
        ),
        spilled_bytes=sum(s.spilled_bytes for s in shards),
        recalled_bytes=sum(s.recalled_bytes for s in shards),
        dropped_bytes=sum(s.dropped_bytes for s in shards),
        queue_time=0.0,
        time_to_first_token=new_times[0] - sequence.started if new_times else 0.0,
        inter_token_p50=percentile(gaps, 50),
        inter_token_p99=percentile(gaps, 99),
        layers=tuple(layer for shard in shards for layer in shard.layers),
        pipeline_id="",
        preemptions=sequence.preemptions,
        replays=0,
        recall=recall(request.compression),
        host_attended_bytes=sum(s.attended_bytes for s in shards),
        reused_tokens=sequence.reused,
        drafted_tokens=sequence.drafting.drafted if sequence.drafting else 0,
        accepted_tokens=sequence.drafting.accepted if sequence.drafting else 0,
        device_peak_bytes=sum(s.device_peak_bytes for s in shards),
        kv_bytes_keep_target=request.compression.kv_bytes_keep,
        kv_bytes_keep_reached=shares.in_bytes(kept_share, len(request.prompt_ids), keep.indexes),
    )
