"""What the answers come to, a setting each."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from bench.humaneval.answers import Answer
from bench.humaneval.setting import BASELINE

HEADINGS = ("setting", "pass@1", f"same text as `{BASELINE}`", "KV kept", "recalled, MiB", "output tokens")


def report(answers: Mapping[str, Mapping[str, Answer]], problems: Sequence[str]) -> dict[str, Any]:
    """The figures of each setting, over ``problems``, which all are answered in all settings."""
    return {name: _figures(own, answers.get(BASELINE), problems) for name, own in answers.items()}


def _figures(
    own: Mapping[str, Answer], baseline: Mapping[str, Answer] | None, problems: Sequence[str]
) -> dict[str, Any]:
    replies = [own[name].reply for name in problems]
    passed = [name for name in problems if own[name].passed]
    told: dict[str, Any] = {"pass_at_1": len(passed) / len(problems), "passed": passed}
    if baseline:
        others = [name for name in problems if own[name].reply.text != baseline[name].reply.text]
        told |= {"identical": 1 - len(others) / len(problems), "others": others}
    return told | {
        "kv_keep_reached": mean(reply.kv_keep_reached for reply in replies),
        "recalled_bytes": mean(reply.recalled_bytes for reply in replies),
        "prompt_tokens": mean(reply.prompt_tokens for reply in replies),
        "output_tokens": mean(reply.output_tokens for reply in replies),
    }


def table(settings: Mapping[str, Mapping[str, Any]], problems: int) -> str:
    """The figures in Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, told in settings.items():
        rows.append(
            (
                name,
                f"{told['pass_at_1']:.1%} ({len(told['passed'])} of {problems})",
                f"{told['identical']:.1%}" if "identical" in told else "",
                f"{told['kv_keep_reached']:.3f}",
                f"{told['recalled_bytes'] / 2**20:.1f}",
                f"{told['output_tokens']:.0f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
