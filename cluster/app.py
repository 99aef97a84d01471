"""Builds the Serve application: a router, and gangs of shards."""

from typing import Any

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    GangSchedulingConfig,
    RequestRouterConfig,
)

from cluster.autoscale import MemoryPressurePolicy
from cluster.config import ClusterConfig, parse_config
from cluster.edge.replica import Edge
from cluster.partition import boundaries, layer_costs
from pyramidserve.errors import ConfigurationError
from workers.budget.kv_format import stored
from workers.engine.settings import settings_of
from workers.model.checkpoint import resolve_checkpoint
from workers.model.config import ModelConfig, read_config
from workers.policies.measured import use_gates
from workers.shard import Shard, ShardConfig

# A resource of the node that clients reach; the router runs there.
ROUTER_RESOURCE = "pyramidserve_router"
ROUTER_SHARE = 0.001
HEALTH_PERIOD_SECONDS = 1.0
# As often a replica may fail to start before Serve gives its deployment up; some faults go by themselves.
STARTS = 3
METRIC_SECONDS = 0.5


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application that ``deploy/serve.yaml`` names; ``arguments`` as ClusterConfig has them.

    Raises ConfigurationError or CheckpointError.
    """
    if not arguments:  # Serve passes over names that it does not know, such as "arg"
        raise ConfigurationError("the application has no args; give at least its model there")
    config = parse_config(arguments, "args.")
    model = read_config(resolve_checkpoint(config.model), config.max_model_len)
    use_gates(config.gates)
    shard_config = shard_settings(config, model)
    shards = serve.deployment(**_shard_options(config))(Shard).bind(shard_config)
    edge = serve.deployment(
        name="Router",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {ROUTER_RESOURCE: ROUTER_SHARE}},
        max_constructor_retry_count=STARTS,
        graceful_shutdown_timeout_s=config.drain_seconds + 5,
    )(Edge)
    return edge.bind(config, shards)


def shard_settings(config: ClusterConfig, model: ModelConfig) -> ShardConfig:
    """What the shards are told. Raises ConfigurationError when there are more shards than layers."""
    if config.shards > model.layers:
        raise ConfigurationError(
            f"shards is {config.shards}, but {config.model} has {model.summary}; give at most "
            f"{model.layers}"
        )
    kv_dtype = stored(config.kv_dtype, config.dtype)
    costs, head_cost = layer_costs(model, config.compression, kv_dtype)
    return ShardConfig(
        model=config.model,
        boundaries=boundaries(costs, head_cost, config.shards),
        compression=config.compression,
        settings=settings_of(config),
        session_seconds=config.session_max_age,
        host=config.shard_host,
        threads=config.threads,
        stall_seconds=config.stall_seconds,
    )


def _shard_options(config: ClusterConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": "Shard",
        "ray_actor_options": {
            "num_cpus": config.cpus_per_shard,
            "num_gpus": config.gpus_per_shard,
            # Set before torch is imported, or its pools take every core.
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": str(config.threads),
                    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(METRIC_SECONDS),
                }
            },
        },
        "max_constructor_retry_count": STARTS,
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "graceful_shutdown_timeout_s": max(config.drain_seconds, config.leave_seconds) + 5,
        "graceful_shutdown_wait_loop_s": 0.2,
        # A lease is one ongoing request for as long as a shard lives.
        "max_ongoing_requests": 8,
        "request_router_config": RequestRouterConfig(
            request_router_class="workers.shard:GangRouter"  # type: ignore[arg-type]
        ),
    }
    if config.max_pipelines:
        options["autoscaling_config"] = AutoscalingConfig(
            # Multiples of a gang: others would make Serve go up and down for ever.
            min_replicas=config.pipelines * config.shards,
            max_replicas=config.max_pipelines * config.shards,
            upscale_delay_s=config.scale_up_seconds,
            downscale_delay_s=config.scale_down_seconds,
            look_back_period_s=2 * METRIC_SECONDS,
            metrics_interval_s=METRIC_SECONDS,
            policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function=MemoryPressurePolicy,
                policy_kwargs={"shards": config.shards, "target": config.target_pressure},
            ),
        )
    else:
        options["num_replicas"] = config.pipelines * config.shards
    if config.shards > 1:
        options["gang_scheduling_config"] = GangSchedulingConfig(gang_size=config.shards)
    return options


def demand(config: ClusterConfig) -> dict[str, float]:
    """What the application takes of the cluster, by Ray's names of resources."""
    shards = config.pipelines * config.shards
    return {
        "CPU": shards * config.cpus_per_shard,
        "GPU": shards * config.gpus_per_shard,
        ROUTER_RESOURCE: ROUTER_SHARE,
    }
