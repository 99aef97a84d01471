"""OpenVINO GenAI's continuous batching; runs in its own venv."""

from collections.abc import Sequence

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

from bench.peers.job import Job, Result, Tell, answer, timed

BLOCK_TOKENS = 32


def run(job: Job) -> Result:
    """Steps the pipeline by hand, so that the time of every token is known."""
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = job.blocks(BLOCK_TOKENS)
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = job.sequences(BLOCK_TOKENS)
    if job.keep_tokens:
        scheduler.max_num_seqs = len(job.prompts)
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=32,
            recent_size=128,
            max_cache_size=job.keep_tokens,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    properties: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": job.precision,
        "INFERENCE_NUM_THREADS": job.threads,
    }
    if job.kv_precision:
        properties["KV_CACHE_PRECISION"] = job.kv_precision
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)
    generation = genai.GenerationConfig(max_new_tokens=job.output, ignore_eos=True)

    def generate(prompts: Sequence[list[int]], tell: Tell) -> None:
        handles = [
            pipeline.add_request(index, openvino.Tensor(np.array([prompt], np.int64)), generation)
            for index, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    (output,) = handle.read().values()
                    tell(index, len(output.generated_ids))

    return timed(job, generate)


if __name__ == "__main__":
    answer(run)
