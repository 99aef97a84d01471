"""The deployment files are what Ray's own schemas accept, and what our code reads."""

import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from cluster_process import write_config
from pydantic import BaseModel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from cluster.app import ROUTER_RESOURCE, build, demand
from cluster.deploy.deployment import DEFAULT_DEPLOYMENT, read_deployment
from cluster.deploy.serve_names import DEPLOY_FILE
from pyramidserve.cli import main
from pyramidserve.errors import ConfigurationError

DEPLOY = Path(__file__).parents[3] / "deploy"


def test_the_serve_config_is_valid_and_its_arguments_are_ours() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "serve.yaml").read_text()))
    assert [application.name for application in schema.applications] == ["pyramidserve"]
    config = read_deployment(DEPLOY / "serve.yaml").config
    assert (config.pipelines, config.shards) == (1, 2)
    assert config.compression.kv_keep == 0.45


def test_no_config_file_means_the_defaults() -> None:
    assert read_deployment(None).config.model == "smollm2-135m-instruct"


def test_the_cluster_config_is_what_ray_accepts() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"][ROUTER_RESOURCE] >= demand(read_deployment(None).config)[ROUTER_RESOURCE]


def test_ray_would_have_refused_a_wrong_cluster_config() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(config | {"max_wrokers": 8}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: [", "not a Serve config file"),
        ("applications: []", "0 applications"),
        ("[]", r"the file is \[\]; it must be a mapping"),
        ("{applications: {name: a}}", "applications is .*; it must be a list"),
        ("{applications: [{name: a, import_path: cluster.app:build}]}", r"applications\[0\] has no args"),
        ("{applications: [{name: a, import_path: cluster.app:build, args: [2]}]}", r"args is \[2\]"),
        ("{applications: [{name: a, name: b}]}", "name stands there twice"),
        ("{applications: [{name: a, import_path: cluster.app:build, args: {shards: 0}}]}", "shards is 0"),
    ],
)
def test_a_wrong_serve_config_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        read_deployment(file)


# What is misspelt, where, and what was meant.
TYPOS = [
    ({"proxy_locaton": "Disabled"}, "proxy_locaton", "proxy_location"),
    ({"aplications": []}, "aplications", "applications"),
    ({"logging_config": {"loglevel": 1}}, "logging_config.loglevel", "log_level"),
    ({"applications": [{"arg": {}}]}, "applications[0].arg", "args"),
    ({"applications": [{"name": "a", "import_path": "cluster.app:biuld", "args": {}}]}, "biuld", "build"),
    ({"applications": [{"deployment": []}]}, "applications[0].deployment", "deployments"),
    ({"applications": [{"runtime_env": {"env_var": {}}}]}, "runtime_env.env_var", "env_vars"),
    (
        {"applications": [{"deployments": [{"name": "Router"}, {"nam": "Shard"}]}]},
        "applications[0].deployments[1].nam",
        "name",
    ),
    (
        {"applications": [{"deployments": [{"ray_actor_options": {"num_cpu": 1}}]}]},
        "applications[0].deployments[0].ray_actor_options.num_cpu",
        "num_cpus",
    ),
    (
        {"applications": [{"deployments": [{"autoscaling_config": {"policy": {"policy_args": 1}}}]}]},
        "deployments[0].autoscaling_config.policy.policy_args",
        "policy_kwargs",
    ),
]
ARGUMENT_TYPOS = [
    ({"kv_byte": 1}, "kv_byte", "kv_bytes"),
    ({"compression": {"polcy": "full"}}, "compression.polcy", "policy"),
    ({"compression": {"parameter": {"sinks": 1}}}, "compression.parameter", "parameters"),
    ({"admit": {"patienc": 1}}, "admit.patienc", "patience"),
    ({"route": {"messages_per_cores": 1}}, "route.messages_per_cores", "messages_per_core"),
    ({"schedule": {"quiet_slices": 1}}, "schedule.quiet_slices", "quiet_slice"),
    ({"execute": {"block_row": 1}}, "execute.block_row", "block_rows"),
    ({"reference": {"gather_byte": 1}}, "reference.gather_byte", "gather_bytes"),
]


@pytest.mark.parametrize(("written", "place", "meant"), TYPOS)
def test_a_misspelt_name_is_named_with_its_place_and_what_was_meant(
    written: dict[str, Any], place: str, meant: str, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigurationError, match=f"{re.escape(place)}; did you mean .*{meant}"):
        read_deployment(file)


@pytest.mark.parametrize(("written", "place", "meant"), ARGUMENT_TYPOS)
def test_a_misspelt_setting_is_so_too(
    written: dict[str, Any], place: str, meant: str, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "serve.yaml", **written)
    place = re.escape(f"applications[0].args.{place}; did you mean {meant}?")
    with pytest.raises(ConfigurationError, match=place):
        read_deployment(file)


def test_a_deployment_that_there_is_not_is_named(tmp_path: Path) -> None:
    raw = deepcopy(DEFAULT_DEPLOYMENT)
    raw["applications"][0]["deployments"] = [{"name": "Shrad"}]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigurationError, match=r"deployments\[0\].name: Shrad; did you mean Shard"):
        read_deployment(tmp_path / "serve.yaml")


def test_the_command_says_so_before_it_imports_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("{applications: [{name: a, import_path: 'cluster.app:build', arg: {shards: 3}}]}")
    for name in ("cluster.deploy.serving", "cluster.deploy.rollout"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error now
    for command in ("serve", "rollout", "demo"):
        assert main([command, "--config", str(file)]) == 1
        assert "applications[0].arg; did you mean args?" in capsys.readouterr().err


def test_serves_own_command_is_told_of_args_that_it_passed_over() -> None:
    with pytest.raises(ConfigurationError, match="no args"):
        build({})


def names_of(model: type[BaseModel]) -> dict[str, Any]:
    """The names that a schema of Ray's has, as ``serve_names`` lists them."""
    return {name: inner(field.annotation, name) for name, field in model.model_fields.items()}


def inner(annotation: Any, name: str) -> Any:
    if name == "runtime_env":
        return dict.fromkeys(RuntimeEnv.known_fields)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return names_of(annotation)
    found = [inner(each, "") for each in get_args(annotation)]
    if get_origin(annotation) is list and isinstance(found[0], dict):
        return found
    return next((each for each in found if each), None)


def test_the_names_are_those_that_ray_knows() -> None:
    ray = names_of(ServeDeploySchema)
    ray["controller_options"]["runtime_env"] = {"env_vars": None}  # others are refused
    (application,) = ray["applications"]
    application["autoscaling_policy"] = names_of(AutoscalingPolicy)
    (deployment,) = application["deployments"]
    deployment["backpressure_config"] = deployment["deployment_actors"] = None  # Ray checks them
    assert ray == DEPLOY_FILE


def test_a_missing_serve_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml"):
        read_deployment(tmp_path / "nowhere.yaml")
