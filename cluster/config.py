"""How a cluster is set up: the ``args`` of the application in ``deploy/serve.yaml``."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_origin

from cluster.admit.tuning import AdmitTuning
from cluster.naming import check_names
from cluster.route.tuning import RouteTuning
from pyramidserve.errors import ConfigurationError, InvalidRequestError
from pyramidserve.types import Compression
from workers.backends import BACKENDS
from workers.budget.kv_format import KV_DTYPES
from workers.engine.settings import EngineSettings
from workers.model.config import DTYPES
from workers.policies.registry import enable
from workers.policies.valid import validate

DEVICES = ("cpu", "cuda")
SAMPLING_DEFAULTS = ("model", "greedy")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(EngineSettings):
    """One model, served by one router and a number of pipelines; of shards, see ``EngineSettings``.

    Attributes:
        model: checkpoint: "smollm2-135m-instruct", a folder, a .gguf file or a hub repository; see
            ``resolve_checkpoint``.
        pipelines: gangs of shards, each a whole model; with ``max_pipelines``, the fewest there are.
        max_pipelines: the most that the autoscaler makes of them; 0 turns it off.
        target_pressure: the share of the KV memory that the autoscaler wants to be used.
        scale_up_seconds, scale_down_seconds: how long more, or fewer, must be wanted.
        leave_seconds: how long requests may go on in a pipeline that is scaled away.
        shards: shards of a pipeline.
        threads: of torch, in each shard.
        cpus_per_shard, gpus_per_shard: what Ray reserves for a shard.
        stall_seconds: a step that takes longer restarts its pipeline.
        shard_host: address of the traffic between shards, and between them and the router; "": each node's
            own in Ray, or 127.0.0.1 on a cluster of one node that `pyramidserve serve` has started.
        router_host, router_port: where the router listens.
        http_port: where it has OpenAI's HTTP API on the same host; 0: nowhere.
        metrics_port: where it tells Prometheus of itself; 0: nowhere. No token is asked for there.
        served_model_name: what HTTP clients call the model; "": as ``model`` says.
        cors_origins: of pages in browsers that may call it, beside its own; "*": all.
        tls_certificate, tls_key: PEM files; with them, the router's port wants TLS.
        tenants_file: YAML list of name, token and weight; with it, callers need a bearer token.
        budgets: file that `pyramidserve calibrate` has written of the model; "": what comes with this.
        queue_limit: requests that may wait; a tenant may always have its share of them, by its weight.
        session_limit: sessions that the router remembers.
        session_max_age: seconds that a session, and its KV, is remembered after its last use.
        bind_seconds: how long the router waits for its port.
        drain_seconds: how long requests may go on when the cluster shuts down.
        control_tokens_in_messages: control tokens that a message has typed count as such; else as text.
        defaults: how tokens are drawn where a request is silent: "model", as its generation_config.json
            says, or "greedy".
        compression: of requests that do not ask for any.
        admit, route: what may suit another machine better, see ``AdmitTuning`` and ``RouteTuning``.
    """

    model: str = "smollm2-135m-instruct"
    pipelines: int = 1
    max_pipelines: int = 0
    target_pressure: float = 0.8
    scale_up_seconds: float = 2.0
    scale_down_seconds: float = 60.0
    leave_seconds: float = 600.0
    shards: int = 2
    threads: int = 1
    cpus_per_shard: float = 1.0
    gpus_per_shard: float = 0.0
    stall_seconds: float = 120.0
    shard_host: str = ""
    router_host: str = "127.0.0.1"
    router_port: int = 8700
    http_port: int = 8701
    metrics_port: int = 8702
    served_model_name: str = ""
    cors_origins: tuple[str, ...] = ()
    tls_certificate: str = ""
    tls_key: str = ""
    tenants_file: str = ""
    budgets: str = ""
    queue_limit: int = 1024
    session_limit: int = 10_000
    session_max_age: float = 3600.0
    bind_seconds: float = 30.0
    drain_seconds: float = 5.0
    control_tokens_in_messages: bool = False
    defaults: str = "model"
    compression: Compression = field(default_factory=lambda: Compression("pyramid", "prune", kv_keep=0.45))
    admit: AdmitTuning = AdmitTuning()
    route: RouteTuning = RouteTuning()

    @property
    def places(self) -> dict[str, tuple[str, int]]:
        """Where clients find it, by the names of the ports."""
        return places_of(self.router_host, self.router_port, self.http_port, self.metrics_port)

    def __post_init__(self) -> None:
        """Raises ConfigurationError, naming the value and its range."""
        for name in (
            "pipelines",
            "shards",
            "kv_bytes",
            "max_sequences",
            "max_prefill_tokens",
            "threads",
            "queue_limit",
            "session_limit",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_pipelines and self.max_pipelines < self.pipelines:
            raise ConfigurationError(
                f"max_pipelines is {self.max_pipelines} and pipelines is {self.pipelines}; "
                "give at least as many, or 0 for no autoscaling"
            )
        if not 0 < self.target_pressure <= 1:
            raise ConfigurationError(f"target_pressure is {self.target_pressure}; it must be in (0, 1]")
        for name in (
            "max_model_len",
            "host_bytes",
            "max_sessions",
            "cpus_per_shard",
            "gpus_per_shard",
            "drain_seconds",
            "bind_seconds",
            "scale_up_seconds",
            "scale_down_seconds",
            "leave_seconds",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}; it must be finite and 0 or more"
                )
        for name in ("stall_seconds", "session_max_age"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be finite and above 0")
        if self.device not in DEVICES:
            raise ConfigurationError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        if self.backend not in BACKENDS:
            raise ConfigurationError(
                f"backend is {self.backend!r}; it must be one of {', '.join(BACKENDS)}"
            )
        for name, known in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES), ("host_kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        for name in ("router_port", "http_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 0 to 65535")
        taken: dict[tuple[str, int], str] = {}
        for name, place in self.places.items():
            if place[1] and place in taken:
                raise ConfigurationError(
                    f"{name} and {taken[place]} are both {place[1]}; choose another {name}, or 0 for none"
                )
            taken[place] = name
        if self.defaults not in SAMPLING_DEFAULTS:
            raise ConfigurationError(
                f"defaults is {self.defaults!r}; it must be one of {', '.join(SAMPLING_DEFAULTS)}"
            )
        enable(self.policies)
        try:
            validate(self.compression)
        except InvalidRequestError as error:
            raise ConfigurationError(f"compression: {error.message}") from error


def places_of(host: str, router_port: int, http_port: int, metrics_port: int) -> dict[str, tuple[str, int]]:
    """Hosts and ports by the names of the ports; but for the first, of those that there are."""
    others = {"http_port": http_port, "metrics_port": metrics_port}
    ports = {"router_port": router_port} | {name: port for name, port in others.items() if port}
    return {name: (host, port) for name, port in ports.items()}


def parse_config(arguments: Mapping[str, Any], place: str = "") -> ClusterConfig:
    """Reads the application's arguments; in messages ``place`` goes in front of their names.

    Raises ConfigurationError on unknown names and wrong types.
    """
    config: ClusterConfig = _typed(ClusterConfig, arguments, place)
    return config


def _typed(kind: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of the dataclass ``kind`` from its fields."""
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    check_names(values, known, prefix)
    return kind(**{name: _checked(known[name], value, prefix + name) for name, value in values.items()})


def _checked(wanted: Any, value: Any, name: str) -> Any:
    if get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise ConfigurationError(f"{name} is {value!r}; it must be a list of names")
        return tuple(value)
    options = get_args(wanted) or (wanted,)
    if value is None and NoneType in options:
        return None
    kind: type[Any] = options[0]
    if get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{name} is {value!r}; it must be a mapping of knobs")
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{name} is {value!r}; it must be a mapping of settings")
        return _typed(kind, value, f"{name}.")
    if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, int | kind)):
        raise ConfigurationError(f"{name} is {value!r}; it must be a number ({kind.__name__})")
    if kind is bool and not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; it must be true or false")
    if kind is str and not isinstance(value, str):
        raise ConfigurationError(f"{name} is {value!r}; it must be a text")
    return value
