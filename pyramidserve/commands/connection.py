"""Options of the commands that talk to a cluster."""

import argparse
import os
from pathlib import Path
from typing import TypedDict

from pyramidserve._requests import DEFAULT_TARGET
from pyramidserve.errors import InvalidRequestError

TOKEN_VARIABLE = "PYRAMIDSERVE_TOKEN"


class Connection(TypedDict):
    """What ``Client`` and ``AsyncClient`` are told."""

    target: str
    token: str | None
    certificate: bytes | None


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the cluster is, and how to get in."""
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT")
    parser.add_argument(
        "--token", default=os.environ.get(TOKEN_VARIABLE), help=f"default: the variable {TOKEN_VARIABLE}"
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="PEM", help="whom TLS trusts; without it there is no TLS"
    )


def connection(arguments: argparse.Namespace) -> Connection:
    """What the options say. Raises InvalidRequestError when the certificate cannot be read."""
    certificate = None
    if arguments.certificate:
        try:
            certificate = arguments.certificate.read_bytes()
        except OSError as error:
            raise InvalidRequestError(
                f"--certificate {str(arguments.certificate)!r} cannot be read: {error.strerror}"
            ) from error
    return Connection(target=arguments.target, token=arguments.token, certificate=certificate)
