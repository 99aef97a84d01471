"""Where a decode step goes on a card: ``python -m bench.gpu.profile``, in a minute."""

import argparse
import time

from torch.profiler import ProfilerActivity, profile

from bench.gpu.load import clear, submit_batch, until_all_decode
from bench.gpu.throughput import POLICIES
from workers.device import open_device, synchronize
from workers.engine.engine import Engine, EngineConfig

STEPS, ROWS, OUTPUT = 3, 16, 200


def main(arguments: list[str] | None = None) -> int:
    """Prints milliseconds a step and kernels, for ``full`` and ``prune``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to rehearse")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a rehearsal")
    options = parser.parse_args(arguments)
    device = open_device(options.device)
    shape, batch, prompt, room = (
        ("toy", 4, 64, 64 << 20) if options.tiny else ("llama-2-13b", 32, 512, 40 << 30)
    )
    config = EngineConfig(
        f"random:{shape}",
        device=str(device),
        dtype="float32" if options.tiny else "bfloat16",
        backend="reference",
        kv_bytes=room,
        max_prefill_tokens=8192,
    )
    engine = Engine(config)
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    for name in POLICIES:
        sequences = submit_batch(engine, POLICIES[name], batch, prompt, OUTPUT)
        until_all_decode(engine, sequences)
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        synchronize(device)
        seconds = (time.perf_counter() - began) / STEPS
        with profile(activities=activities, acc_events=True) as profiled:
            for _ in range(STEPS):
                engine.step()
            synchronize(device)
        print(f"{name}, {batch} x {prompt} tokens: {seconds * 1e3:.1f} ms a step; of {STEPS} steps:")
        by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profiled.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=70))
        clear(engine, sequences)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
