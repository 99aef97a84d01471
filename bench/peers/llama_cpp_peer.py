"""llama.cpp's llama-batched-bench, which runs tokens of its own choice."""

import json
import resource
import subprocess

from bench.peers.job import Job, Result, answer, peak_rss

ROUNDED_TO = 256  # tokens of a sequence's context


def run(job: Job) -> Result:
    """Runs the binary that lies beside the model; it processes all prompts, then decodes them together."""
    (prompt,) = {len(each) for each in job.prompts}
    context = -(-(prompt + job.output) // ROUNDED_TO) * ROUNDED_TO * len(job.prompts)
    binary = job.model.rpartition("/")[0] + "/build/bin/llama-batched-bench"
    options = {
        "-m": job.model,
        "-t": job.threads,
        "-c": context,
        "-npp": prompt,
        "-ntg": job.output,
        "-npl": len(job.prompts),
        "-fa": "on",
        "--output-format": "jsonl",
    }
    command = [binary, *(str(word) for option in options.items() for word in option)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    (told,) = (json.loads(line) for line in lines if line.startswith("{"))
    return Result(
        wall_seconds=told["t"],
        output_tokens_per_second=len(job.prompts) * job.output / told["t"],
        prefill_tokens_per_second=told["speed_pp"],
        decode_tokens_per_second=told["speed_tg"],
        ttft_p50=None,
        inter_token_p50=told["t_tg"] / job.output,
        kv_bytes=context * job.kv_token_bytes,
        peak_rss_bytes=peak_rss(resource.RUSAGE_CHILDREN),
    )


if __name__ == "__main__":
    answer(run)
