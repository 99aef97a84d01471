"""Looks at what a deployment on this machine needs, so that a fault shows before anything starts."""

from cluster.app import demand, shard_settings
from cluster.config import ClusterConfig
from cluster.deploy.deployment import Progress
from cluster.edge.server import port_problem, server_credentials
from cluster.front.tenants import read_tenants
from pyramidserve.errors import ConfigurationError, PortInUseError, UnschedulableError
from workers.host_memory import free_host_bytes
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import read_config
from workers.model.weights import open_weights
from workers.policies.measured import use_budgets, use_gates


def check_files(config: ClusterConfig, progress: Progress) -> None:
    """Looks at all files. Makes the checkpoint ready. Raises CheckpointError or ConfigurationError."""
    read_tenants(config.tenants_file)
    use_budgets(config.budgets)
    use_gates(config.gates)
    server_credentials(config.tls_certificate, config.tls_key)
    checkpoint = resolve_checkpoint(config.model, progress)
    model = read_config(checkpoint, config.max_model_len)
    progress(f"{config.model} has {model.summary}")
    shard_settings(config, model)
    open_weights(checkpoint, model)


def check_port(config: ClusterConfig) -> None:
    """Raises PortInUseError when the router could not listen."""
    for name, (host, port) in config.places.items():
        problem = port_problem(host, port)
        if problem is not None:
            raise PortInUseError(
                f"cannot listen on {host}:{port}: {problem}; "
                f"stop the process that listens there or choose another {name}"
            )


def check_memory(config: ClusterConfig) -> None:
    """Raises ConfigurationError when this machine has too little memory for the pools of all shards.

    A pool's pages are taken from the machine when they are first used: each would begin well, and the
    machine would end one of them under load.
    """
    free = free_host_bytes()
    shards = config.pipelines * config.shards
    pool = config.kv_bytes if config.device == "cpu" else 0
    if shards * (pool + config.host_bytes) > free:
        raise ConfigurationError(
            f"{shards} shards want {pool} bytes of kv_bytes and {config.host_bytes} of host_bytes each, "
            f"and this machine or container has {free} free; lower kv_bytes, host_bytes, shards or "
            f"pipelines: each may have {free // shards} in all, less its weights"
        )


def check_resources(config: ClusterConfig, there: dict[str, float]) -> None:
    """Raises UnschedulableError, naming the resource that ``there`` has too little of."""
    for resource, wanted in demand(config).items():
        if wanted > there.get(resource, 0):
            raise UnschedulableError(
                f"the shards need {wanted:g} {resource}, the cluster has {there.get(resource, 0):g}; "
                f"lower pipelines ({config.pipelines}), shards ({config.shards}) or what each shard "
                "reserves, or add nodes"
            )
