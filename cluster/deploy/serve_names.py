"""The names that Ray Serve knows in a deployment file; Ray itself passes over others. Pure.

A mapping has its names, a list is that of its entries, and None is anything: its names are not Serve's,
or Serve checks them itself.
"""

from typing import TypeAlias

Names: TypeAlias = "dict[str, Names] | list[Names] | None"


def _any(*names: str) -> dict[str, Names]:
    return dict.fromkeys(names)


_RUNTIME_ENV = _any(
    *("py_modules", "py_executable", "java_jars", "working_dir", "conda", "pip", "uv", "container"),
    *("env_vars", "excludes", "config", "worker_process_setup_hook", "image_uri", "_nsight"),
    *("_rocprof_sys", "_ray_release", "_ray_commit", "_inject_current_ray"),
)
_LOGGING = _any(
    *("encoding", "log_level", "logs_dir", "enable_access_log", "additional_log_standard_attrs"),
)
_ACTOR: dict[str, Names] = {
    **_any("num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "label_selector"),
    **_any("fallback_strategy"),
    "runtime_env": _RUNTIME_ENV,
}
_POLICY = _any("policy_function", "policy_kwargs")
_AUTOSCALING: dict[str, Names] = {
    **_any("min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests"),
    **_any("metrics_interval_s", "look_back_period_s", "smoothing_factor", "upscale_smoothing_factor"),
    **_any("downscale_smoothing_factor", "upscaling_factor", "downscaling_factor", "downscale_delay_s"),
    **_any("downscale_to_zero_delay_s", "upscale_delay_s", "aggregation_function"),
    "policy": _POLICY,
}
_ROUTER = _any(
    *("request_router_class", "request_router_kwargs", "request_routing_stats_period_s"),
    *("request_routing_stats_timeout_s", "initial_backoff_s", "backoff_multiplier", "max_backoff_s"),
)
_DEPLOYMENT: dict[str, Names] = {
    **_any("name", "num_replicas", "max_ongoing_requests", "max_queued_requests", "backpressure_config"),
    **_any("user_config", "graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s"),
    **_any("health_check_period_s", "health_check_timeout_s", "placement_group_bundles"),
    **_any("placement_group_strategy", "placement_group_bundle_label_selector"),
    **_any("max_replicas_per_node", "deployment_actors", "rolling_update_percentage", "max_surge_percent"),
    "autoscaling_config": _AUTOSCALING,
    "ray_actor_options": _ACTOR,
    "logging_config": _LOGGING,
    "request_router_config": _ROUTER,
    "gang_scheduling_config": _any("gang_size", "gang_placement_strategy", "runtime_failure_policy"),
}
_APPLICATION: dict[str, Names] = {
    **_any("name", "route_prefix", "import_path", "host", "port", "args"),
    **_any("external_scaler_enabled"),
    "autoscaling_policy": _POLICY,
    "runtime_env": _RUNTIME_ENV,
    "deployments": [_DEPLOYMENT],
    "logging_config": _LOGGING,
}
DEPLOY_FILE: dict[str, Names] = {
    **_any("proxy_location", "target_capacity"),
    "http_options": _any(
        *("host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s", "ssl_keyfile"),
        *("ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"),
    ),
    "grpc_options": _any(
        *("port", "grpc_servicer_functions", "request_timeout_s", "enable_reflection"),
    ),
    "controller_options": {"runtime_env": _any("env_vars")},
    "logging_config": _LOGGING,
    "tracing_config": _any("enabled", "exporter_import_path", "sampling_ratio"),
    "applications": [_APPLICATION],
}
