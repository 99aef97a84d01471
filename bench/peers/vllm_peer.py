"""vLLM on CPU; runs in its own venv."""

import os
from collections.abc import Sequence
from itertools import count

from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[import-not-found]

from bench.peers.job import Job, Result, Tell, answer, timed

BLOCK_TOKENS = 128


def run(job: Job) -> Result:
    """Steps the engine by hand in this process, so that the time of every token is known."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(job.threads)))
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-job.kv_bytes // 2**30))
    arguments = EngineArgs(
        model=job.model,
        dtype=job.precision,
        max_model_len=max(map(len, job.prompts)) + job.output,
        max_num_seqs=job.sequences(BLOCK_TOKENS),
        # VLLM_CPU_KVCACHE_SPACE knows whole GiB only.
        num_gpu_blocks_override=job.blocks(BLOCK_TOKENS),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    sampling = SamplingParams(temperature=0, max_tokens=job.output, ignore_eos=True, detokenize=False)
    numbers = count()

    def generate(prompts: Sequence[list[int]], tell: Tell) -> None:
        indices, told = {}, [0] * len(prompts)
        for index, prompt in enumerate(prompts):
            name = str(next(numbers))
            indices[name] = index
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index, tokens = indices[output.request_id], len(output.outputs[0].token_ids)
                tell(index, tokens - told[index])
                told[index] = tokens

    return timed(job, generate)


if __name__ == "__main__":
    answer(run)
