"""Property tests try the same examples each time, and as many as `make test` has time for."""

import ast
import re
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).parents[1]
MOST = 300


def test_chance_has_no_say_in_make_test() -> None:
    assert settings().derandomize
    assert settings().max_examples <= MOST


def test_no_property_takes_more_examples_than_there_is_time_for() -> None:
    asked = {}
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "max_examples":
                asked[f"{file.name}:{node.value.lineno}"] = int(re.sub(r"\D", "", ast.unparse(node.value)))
    assert len(asked) > 5
    assert {where: count for where, count in asked.items() if count > MOST} == {}
