"""A file of what was answered: what is there is not asked again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.humaneval.asking import Reply
from pyramidserve.errors import InvalidRequestError
from workers.whole_file import write_whole


@dataclass(frozen=True)
class Answer:
    """A reply, and whether the program that it ends passes its test."""

    reply: Reply
    passed: bool


class Answers:
    """Answers by setting and by problem, and their file.

    Attributes:
        of: a setting's, by the problems' names.
    """

    def __init__(self, file: Path, conditions: Mapping[str, Any]) -> None:
        """Reads what is in ``file``, if it is there.

        Raises InvalidRequestError where that was answered under other ``conditions``.
        """
        self._file, self._conditions = file, dict(conditions)
        self.of: dict[str, dict[str, Answer]] = {}
        if file.exists():
            told = json.loads(file.read_text())
            for name, value in self._conditions.items():
                if told["conditions"].get(name) != value:
                    raise InvalidRequestError(
                        f"{file} has answers with {name} {told['conditions'].get(name)!r:.200}, here it is "
                        f"{value!r:.200}; give another --out, or remove it"
                    )
            self.of = {
                setting: {
                    problem: Answer(Reply(**each["reply"]), each["passed"]) for problem, each in own.items()
                }
                for setting, own in told["answers"].items()
            }

    def add(self, setting: str, problem: str, answer: Answer) -> None:
        """Takes an answer, and writes all."""
        self.of.setdefault(setting, {})[problem] = answer
        answers = {
            name: {problem: asdict(each) for problem, each in own.items()} for name, own in self.of.items()
        }
        told = {"conditions": self._conditions, "answers": answers}
        write_whole(self._file, json.dumps(told, indent=1))
