"""The `pyramidserve` command line."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

from pyramidserve import __version__
from pyramidserve.commands import chat, state
from pyramidserve.errors import PyramidServeError


class Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options of the command."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Does it and returns the exit code."""
        ...


_CLIENT_COMMANDS: dict[str, Command] = {"chat": chat, "state": state}
_OUR_PACKAGES = ("pyramidserve", "cluster", "workers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: with 2 after wrong usage, and with 0 where only help was asked for.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # No option in front of the command takes a value.
    name = next((word for word in arguments if not word.startswith("-")), "")
    try:
        parsed = _parser(name).parse_args(arguments)
        exit_code: int = parsed.run(parsed)
    except PyramidServeError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OUR_PACKAGES:
            raise
        hint = "needs the server side: pip install 'pyramidserve[server]'"
        print(f"pyramidserve {name} {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return exit_code


def _parser(name: str) -> argparse.ArgumentParser:
    """The parser of all commands; of the server's, only the one called ``name`` is imported."""
    parser = argparse.ArgumentParser(
        prog="pyramidserve", description="Serve LLaMA-family models and talk to them."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands: dict[str, Command | None] = dict(_CLIENT_COMMANDS)
    for entry in entry_points(group="pyramidserve.commands"):
        commands[entry.name] = entry.load() if entry.name == name else None
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command_name, command in commands.items():
        summary = command.SUMMARY if command else f"server side; see {command_name} --help"
        subparser = subparsers.add_parser(command_name, help=summary, description=summary)
        if command:
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser
