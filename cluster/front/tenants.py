"""Who may use the cluster: bearer tokens and the tenants behind them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.naming import check_names
from pyramidserve.errors import ConfigurationError, UnauthenticatedError

HEADER = "authorization"
KEYS = ("name", "token", "weight")
FORM = "a list of entries with name, token and, if not 1, weight"


@dataclass(frozen=True)
class Tenant:
    """One who has a share of the cluster, in proportion to ``weight``."""

    name: str
    weight: float = 1.0


class Tenants:
    """The tenants by their tokens; without any, everybody is the same one."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        # Digests, so that comparing takes equally long whatever was guessed.
        self._tenants = {_digest(token): tenant for token, tenant in tenants.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The share of each, by name."""
        return {tenant.name: tenant.weight for tenant in self._tenants.values()}

    def identify(self, authorization: str) -> str:
        """The name of the tenant whose bearer token that is. Raises UnauthenticatedError."""
        if not self._tenants:
            return ""
        scheme, _, token = authorization.partition(" ")
        tenant = self._tenants.get(_digest(token))
        if scheme.lower() != "bearer" or tenant is None:
            problem = "is not known" if token else "is missing"
            raise UnauthenticatedError(
                f"the bearer token {problem}; send {HEADER}: Bearer TOKEN, or give the client its token"
            )
        return tenant.name


def read_tenants(file: str) -> Tenants:
    """The tenants of a YAML file, or none where there is no file. Raises ConfigurationError."""
    if not file:
        return Tenants({})
    try:
        entries = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"tenants_file {file!r} cannot be read: {error}") from error
    tenants: dict[str, Tenant] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if isinstance(entry, dict):
            check_names(entry, KEYS, f"[{number}] of tenants_file {file!r}: ")
        if not isinstance(entry, dict) or not {"name", "token"} <= entry.keys():
            raise ConfigurationError(f"tenants_file {file!r} is not {FORM}")
        name, token, weight = str(entry["name"]), str(entry["token"]), entry.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigurationError(
                f"tenants_file {file!r}: the weight of {name!r} is {weight!r}; give more than 0"
            )
        if not name or "/" in name or not token or token in tenants:
            raise ConfigurationError(
                f"tenants_file {file!r}: {name!r} needs a name without /, and a token of its own"
            )
        tenants[token] = Tenant(name, float(weight))
    return Tenants(tenants)


def first_token(file: str) -> str | None:
    """A token with which the cluster can ask itself how it does; None where none is needed."""
    if not file:
        return None
    return str(yaml.safe_load(Path(file).read_text())[0]["token"])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
