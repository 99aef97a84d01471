"""The deployment files are what Ray's own schemas accept, and what our code reads."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.app import ROUTER_RESOURCE, demand
from cluster.deploy.deployment import read_deployment
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
        ("{applications: [{name: a, import_path: cluster.app:build, args: {shrads: 2}}]}", "shrads"),
        ("{applications: [{name: a, import_path: cluster.app:build, args: {shards: 0}}]}", "shards is 0"),
    ],
)
def test_a_wrong_serve_config_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        read_deployment(file)


def test_a_missing_serve_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml"):
        read_deployment(tmp_path / "nowhere.yaml")
