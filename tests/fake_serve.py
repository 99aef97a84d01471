"""What a Ray cluster has deployed, as Serve keeps it, without Serve."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.deploy import readiness, rollout
from workers import ray_private


def application(name: str, import_path: str = "cluster.app:build", **args: Any) -> ServeApplicationSchema:
    """The config of an application."""
    return ServeApplicationSchema(name=name, import_path=import_path, route_prefix=None, args=args)


@dataclass
class FakeServe:
    """Serve's controller and Ray's key-value store.

    Attributes:
        configs: of what was deployed from files, with what has gone, as Serve keeps them.
        states: of what is deployed, by name; those without a config were made by `serve.run`.
        calls: each file that was deployed, as the settings of its applications by name.
        taking_over: the applications that were waited for while their routers were to take over.
        awaited: called with the name of an application that is waited for.
    """

    configs: dict[str, ServeApplicationSchema] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    target_capacity: float | None = None
    calls: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    keys: dict[str, bytes] = field(default_factory=dict)
    taking_over: list[str] = field(default_factory=list)
    awaited: Callable[[str], None] = lambda name: None

    def add(self, config: ServeApplicationSchema) -> None:
        self.configs[config.name] = config
        self.states[config.name] = "RUNNING"

    def deploy(self, schema: ServeDeploySchema) -> None:
        """As `apply_config` does: what is not in ``schema``, and was deployed from a file, goes."""
        self.target_capacity = schema.target_capacity
        new = {each.name: each for each in schema.applications}
        for name in self.configs.keys() - new.keys():
            self.states.pop(name, None)
        self.configs = new
        self.states |= dict.fromkeys(new, "RUNNING")
        self.calls.append({each.name: each.args for each in schema.applications})

    def deployed(self) -> tuple[dict[str, Any], dict[str, ServeApplicationSchema]]:
        applications = {
            name: {"status": state, "source": "declarative" if name in self.configs else "imperative"}
            for name, state in self.states.items()
        }
        return {"applications": applications, "target_capacity": self.target_capacity}, dict(self.configs)

    def await_ready(self, name: str, *_: object) -> str:
        """Notes whether the application that is waited for is to take over."""
        if any(key.endswith(f"/{name}") for key in self.keys):
            self.taking_over.append(name)
        self.awaited(name)
        return "127.0.0.1:8700"

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets what is imported find this instead of Ray."""
        for name in ("deploy", "deployed"):
            monkeypatch.setattr(ray_private, name, getattr(self, name))
        monkeypatch.setattr(ray_private, "put", self.keys.__setitem__)
        monkeypatch.setattr(ray_private, "delete", lambda key: self.keys.pop(key, None))
        for module in (readiness, rollout):
            monkeypatch.setattr(module, "await_ready", self.await_ready)
