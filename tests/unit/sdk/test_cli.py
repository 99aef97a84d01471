"""The command line: its commands, its errors and its exit codes."""

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from scripted_inference import ScriptedInference, refuse

from pyramidserve._requests import Access
from pyramidserve.cli import main
from pyramidserve.commands.connection import TOKEN_VARIABLE, add_connection_arguments, connection
from pyramidserve.errors import UnauthenticatedError

pytest_plugins = ["scripted_fixtures"]


def command_module(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Makes ``source`` the command "fake" of the server side."""
    (folder / "fake_command.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "fake_command", raising=False)
    entry = EntryPoint("fake", "fake_command", "pyramidserve.commands")
    monkeypatch.setattr("pyramidserve.cli.entry_points", lambda group: [entry])


def test_errors_are_one_line(
    scripted_target: str,
    scripted: ScriptedInference,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted.script = refuse(UnauthenticatedError("the token\nis unknown"))
    type_in("hello\n")
    assert main(["chat", "--target", scripted_target]) == 1
    assert capsys.readouterr().err == "error: the token is unknown\n"
    assert scripted.turns == {}


@pytest.mark.parametrize("command", ["chat", "state"])
def test_where_nobody_listens_the_target_is_named(
    deaf_target: str,
    command: str,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in("hello\n")
    assert main([command, "--target", deaf_target]) == 1
    assert capsys.readouterr().err.startswith(f"error: no server answers at {deaf_target}: ")


def test_state_prints_a_table(scripted_target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "--target", scripted_target]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:5]] == [
        ["model", "tiny-llama"],
        ["requests", "2", "running,", "1", "of", "64", "queued"],
        ["sessions", "3"],
        ["decisions", "5", "admitted"],
        [],
    ]
    headings, row = printed[5:]
    cells = {
        "pipeline": "gang-0",
        "sequences": "2/8",
        "layers": "0-1",
        "pid": "4242",
        "node": "node-a",
        "pages used": "17",
        "reserved": "31",
        "total": "512",
        "page KiB": "16.0",
        "host MiB": "3.0",
        "of": "8192.0",
        "workspace MiB": "5.0",
        "resident MiB": "300.0",
        "device MiB": "200.0",
        "most": "250.0",
    }
    assert row.split() == list(cells.values())
    for heading, cell in cells.items():
        assert row.startswith(cell, headings.index(heading))


@pytest.mark.parametrize("arguments", [[], ["dance"], ["state", "--no-such-option"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_server_commands_are_run_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = """
SUMMARY = "answers"
def add_arguments(parser):
    parser.add_argument("--code", type=int)
def run(arguments):
    return arguments.code
"""
    command_module(monkeypatch, tmp_path, source)
    assert main(["fake", "--code", "42"]) == 42


def test_help_lists_server_commands_without_importing_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_module(monkeypatch, tmp_path, "raise AssertionError('imported')")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {"chat", "state", "fake"} <= set(listed)


def test_a_missing_server_side_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_module(monkeypatch, tmp_path, "import a_package_that_nobody_has")
    assert main(["fake"]) == 1
    assert (
        capsys.readouterr().err
        == "pyramidserve fake needs the server side: pip install 'pyramidserve[server]'\n"
    )


def test_a_missing_module_of_our_own_is_not_explained_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command_module(monkeypatch, tmp_path, "import pyramidserve.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["fake"])


def test_a_certificate_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "--certificate", "/nowhere.pem"]) == 1
    assert "--certificate '/nowhere.pem' cannot be read" in capsys.readouterr().err


def test_the_token_comes_from_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "from the environment")
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    assert connection(parser.parse_args([]))["token"] == "from the environment"
    assert connection(parser.parse_args(["--token", "given"]))["token"] == "given"
    assert Access("given").metadata == (("authorization", "Bearer given"),)
    assert Access().metadata == ()
