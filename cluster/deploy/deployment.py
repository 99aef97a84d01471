"""What a deployment file says, with every name in it known, before Ray or torch is imported. Pure."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig, parse_config
from cluster.deploy.serve_names import DEPLOY_FILE, Names
from cluster.naming import check_names
from pyramidserve.errors import ConfigurationError

Progress = Callable[[str], None]

IMPORT_PATH = "cluster.app:build"
# What an application is made of; a file may change how Serve runs each of them.
PARTS = ("Router", "Shard")

# What is served when no deployment file is given.
DEFAULT_DEPLOYMENT: dict[str, Any] = {
    "proxy_location": "Disabled",
    "applications": [
        {
            "name": "pyramidserve",
            "import_path": IMPORT_PATH,
            "route_prefix": None,
            "args": {"model": ClusterConfig.model},
        }
    ],
}


@dataclass(frozen=True)
class Deployment:
    """A deployment file with one application of ours: ``raw`` for Serve, ``config`` for us."""

    raw: dict[str, Any]
    config: ClusterConfig

    @property
    def name(self) -> str:
        """Of the application."""
        return str(self.raw["applications"][0]["name"])


def read_deployment(path: Path | None) -> Deployment:
    """Reads a deployment file; None: the default deployment.

    Raises ConfigurationError, naming what is unknown, where it is, and what was probably meant.
    """
    if path is None:
        raw: Any = DEFAULT_DEPLOYMENT
    else:
        try:
            raw = yaml.load(path.read_text(), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{path} is not a Serve config file: {error}") from error
    try:
        return _deployment(raw)
    except ConfigurationError as error:
        raise type(error)(f"{path}: {error.message}") from error


def _deployment(raw: Any) -> Deployment:
    _check(raw, DEPLOY_FILE, "")
    applications: list[dict[str, Any]] = raw.get("applications") or []
    if len(applications) != 1:
        raise ConfigurationError(f"there are {len(applications)} applications; give one")
    application, place = applications[0], "applications[0]"
    for name in ("name", "import_path", "args"):
        if name not in application:
            raise ConfigurationError(f"{place} has no {name}; give it")
    check_names([application["import_path"]], [IMPORT_PATH], f"{place}.import_path: ")
    for number, part in enumerate(application.get("deployments") or ()):
        check_names([part.get("name")], PARTS, f"{place}.deployments[{number}].name: ")
    arguments = application["args"]
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(f"{place}.args is {arguments!r}; it must be a mapping of settings")
    return Deployment(raw, parse_config(arguments, f"{place}.args."))


def _check(value: Any, names: Names, place: str) -> None:
    """Raises ConfigurationError where ``value`` has a name that ``names`` does not have."""
    where = place.rstrip(".") or "the file"
    if isinstance(names, list):
        if not isinstance(value, list):
            raise ConfigurationError(f"{where} is {value!r}; it must be a list")
        for number, each in enumerate(value):
            _check(each, names[0], f"{where}[{number}].")
    elif names is not None:
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{where} is {value!r}; it must be a mapping of settings")
        check_names(value, names, place)
        for name, each in value.items():
            if each is not None:
                _check(each, names[name], f"{place}{name}.")


class _Loader(yaml.SafeLoader):
    """YAML in which a name that stands twice is an error: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
