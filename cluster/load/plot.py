"""A picture of a run over time."""

from pathlib import Path
from typing import Any


def draw(told: dict[str, Any], title: str, file: Path) -> None:
    """Draws ``series`` of a run."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(9, 13), layout="constrained")
    arrivals, waits, gaps, counts, pools, host = figure.subplots(6, 1, sharex=True)
    figure.suptitle(title)
    moments = told["moment"]
    windows = {name: [each[name] for each in told["windows"]] for name in told["windows"][0]}

    arrivals.hist(told["due"], bins=len(windows["moment"]), color="C7")
    arrivals.set(ylabel="turns")
    goodput = arrivals.twinx()
    goodput.plot(windows["moment"], windows["goodput"], color="C2")
    goodput.set(ylabel="goodput, turns/s", ylim=(0, None))

    waits.plot(told["due"], told["ttft"], ".", color="C7")
    for name, color in (("ttft_p50", "C0"), ("ttft_p99", "C3")):
        waits.plot(windows["moment"], windows[name], color=color, label=name[-3:])
    waits.set(ylabel="first token, s", ylim=(0, None))
    waits.legend(loc="upper left")

    gaps.plot(windows["moment"], 1000 * np.asarray(windows["inter_token_p99"], float))
    gaps.set(ylabel="inter-token p99, ms", ylim=(0, None))

    for name in ("queued", "running"):
        counts.plot(moments, told[name], label=name)
    counts.legend(loc="upper left")
    replicas = counts.twinx()
    replicas.step(moments, told["pipelines"], color="C7", where="post")
    replicas.set(ylabel="pipelines", ylim=(0, None))

    for name, shares in told["pages_used"].items():
        pools.plot(moments, 100 * np.asarray(shares, float), label=name)
    pools.set(ylabel="pages in use, %", ylim=(0, 105))

    host.plot(moments, np.asarray(told["host_bytes"]) / 2**20)
    host.set(ylabel="spilled, MiB", xlabel="seconds", ylim=(0, None))
    figure.savefig(file, dpi=110)
