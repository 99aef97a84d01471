"""Every command that the README and docs/ name is run by a test, or is an exception with a reason."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLAIMS, RECALL = "tests/integration/test_claims.py", "tests/integration/test_recall_claims.py"
ENGINE, SIMULATE = "tests/integration/test_bench.py", "tests/unit/simulation/test_simulate_command.py"
# A command → the file that runs it, and what is written there where it does.
RUN_BY = {
    "bench.gpu.check": ("Makefile", "-m bench.gpu.check --device cpu --tiny"),
    "bench.gpu.profile": ("Makefile", "-m bench.gpu.profile --device cpu --tiny"),
    "bench.gpu.report": ("Makefile", "-m bench.gpu.report"),
    "bench.humaneval": ("tests/integration/test_embedded_cluster.py", '"-m", "bench.humaneval"'),
    "bench.masks": (CLAIMS, '"bench.masks"'),
    "bench.path": (CLAIMS, '"bench.path"'),
    "bench.pools": (CLAIMS, '"bench.pools"'),
    "bench.recall.exact": (RECALL, 'measured("exact"'),
    "bench.recall.facts": (RECALL, '"facts --'),
    "bench.recall.step": (RECALL, '"step --'),
    "bench.recall.turns": (RECALL, 'measured("turns"'),
    "bench.shapes": (RECALL, '"bench.shapes"'),
    "curl": ("tests/integration/test_http_cluster.py", '"curl", "-sN"'),
    "make demo": (CLAIMS, '("demo", '),
    "make gpu-check": (".ci/run", "make gpu-check"),
    "make humaneval": (CLAIMS, '("humaneval", '),
    "make serve": (CLAIMS, '("serve", '),
    "make test": (".ci/run", "make test"),
    "pip install": ("tests/packaging/test_wheel.py", '"pip", "install"'),
    "pytest": ("Makefile", "$(BIN)/pytest"),
    "pyramidserve bench engine": (CLAIMS, '"bench", "engine"'),
    "pyramidserve bench engine --shards": (ENGINE, '"--shards", "2"'),
    "pyramidserve bench quality": ("tests/integration/test_bench_quality.py", '"bench", "quality"'),
    "pyramidserve bench serve": ("tests/integration/test_bench_serve.py", '"bench", "serve"'),
    "pyramidserve bench stall": (ENGINE, '"bench", "stall"'),
    "pyramidserve calibrate": ("tests/conformance/test_calibrate.py", '"calibrate", str(model)'),
    "pyramidserve chat": ("tests/unit/sdk/test_cli_chat.py", '"chat"'),
    "pyramidserve demo": (CLAIMS, '"demo", "--config"'),
    "pyramidserve rollout": ("tests/integration/test_rollout.py", '"rollout", "--config"'),
    "pyramidserve serve": ("tests/cluster_process.py", '"serve", "--config"'),
    "pyramidserve simulate": (CLAIMS, '"simulate", *setup'),
    "pyramidserve simulate --check": (CLAIMS, '"--check", files'),
    "pyramidserve state": ("tests/unit/sdk/test_cli.py", '"state", "--target"'),
    "pyramidserve trace": (CLAIMS, '"trace", *prompt'),
}
EXCEPTIONS = {
    "bench.peers.compare": "wants other engines, 8 GB of them",
    "bench.peers.quality": "wants kvpress; tests/unit/test_quality_peers.py has another",
    "make browser": "wants Chromium",
    "make clients": "wants environments of 10 GB",
    "make soak": "takes hours",
    "serve deploy": "is Ray's, for its dashboard; tests/unit/deploy reads the file as it does",
}
# Of commands that measure something else with them.
TELLING_OPTIONS = {"pyramidserve bench engine": "--shards", "pyramidserve simulate": "--check"}
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
PYRAMIDSERVE = {"chat", "state", *ENTRY_POINTS["pyramidserve.commands"]}
BLOCK = re.compile(r"(?:^ {4}.*\n|^\n(?= {4}))+", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")


def blocks(text: str) -> list[list[str]]:
    """The lines of the indented blocks; fenced ones are Python and pictures."""
    found = BLOCK.findall(FENCED.sub("", text))
    return [[line.strip() for line in block.strip().splitlines()] for block in found]


def command_of(text: str) -> str | None:
    """What ``text`` runs, without options that tell nothing; None if it is no command."""
    words = text.removeprefix("$ ").removeprefix(".venv/bin/").split()
    match words:
        case ["serve", "deploy", *_]:
            return "serve deploy"
        case ["python", "-m", module, *_]:
            return module
        case ["make" | "pip", target, *_]:
            return f"{words[0]} {target}"
        case ["pytest" | "curl", *_]:
            return words[0]
    words = words[1:] if words[:1] == ["pyramidserve"] else words
    if not words or words[0] not in PYRAMIDSERVE:
        return None
    subject = words[1:2] if words[0] == "bench" else []
    if words[0] == "bench" and not subject:
        return None
    name = " ".join(["pyramidserve", words[0], *subject])
    option = TELLING_OPTIONS.get(name, "")
    return f"{name} {option}" if option in words[1:] else name


def named(text: str) -> Iterator[str]:
    """The commands that a document names."""
    for block in blocks(text):
        yield from filter(None, map(command_of, block))
    prose = BLOCK.sub("", FENCED.sub("", text))
    yield from filter(None, (command_of(" ".join(span.split())) for span in SPAN.findall(prose)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_command_that_is_named_is_run(document: Path) -> None:
    commands = set(named(document.read_text()))
    assert commands
    assert commands - RUN_BY.keys() - EXCEPTIONS.keys() == set()


def test_every_block_that_is_not_python_begins_with_a_command() -> None:
    for document in DOCUMENTS:
        for first, *_ in blocks(document.read_text()):
            assert command_of(first), f"{first!r} is no command that is known here; add it to command_of"


def test_what_is_said_to_run_a_command_does_so() -> None:
    for command, (file, text) in RUN_BY.items():
        assert text in (ROOT / file).read_text(), f"{file} does not run {command!r}: {text!r} is not there"


def test_no_command_is_listed_that_nothing_names() -> None:
    everywhere = {command for document in DOCUMENTS for command in named(document.read_text())}
    listed = {**RUN_BY, **EXCEPTIONS}
    assert listed.keys() - everywhere == {"pyramidserve demo"}, "`make demo` runs that one"


def test_every_option_that_is_named_is_one() -> None:
    declared = "".join(
        file.read_text()
        for folder in ("bench", "cluster/commands", "pyramidserve/commands")
        for file in (ROOT / folder).rglob("*.py")
    )
    for document in DOCUMENTS:
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", FENCED.sub("", document.read_text()))):
            assert f'"{option}"' in declared, f"{document.name} names {option}"


def test_every_test_that_is_named_is_there() -> None:
    for document in DOCUMENTS:
        for file in re.findall(r"tests/[\w/]+\.py", document.read_text()):
            assert (ROOT / file).is_file(), f"{document.name} names {file}"


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("$ make demo", "make demo"),
        (".venv/bin/pyramidserve bench engine --shards 2", "pyramidserve bench engine --shards"),
        ("bench stall", "pyramidserve bench stall"),
        ("python -m bench.new --fast", "bench.new"),
        ("serve deploy deploy/serve.yaml", "serve deploy"),
        ("simulate --measured … --check …", "pyramidserve simulate --check"),
        ("kv_keep=0.45", None),
        ("bench/path.py", None),
    ],
)
def test_a_command_is_told_from_other_code(text: str, command: str | None) -> None:
    assert command_of(text) == command
