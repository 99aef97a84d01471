"""How a deployment takes the place of another."""

import socket

import pytest
from ray.serve.schema import ServeApplicationSchema

from cluster.config import parse_config
from cluster.deploy.rollout import check_place, successor
from cluster.edge.server import port_problem
from pyramidserve.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "taken", "becomes"),
    [
        ("chat", ["chat"], "chat-2"),
        ("chat", ["chat-2"], "chat-3"),
        ("chat-7", ["chat", "chat-9"], "chat-10"),
        ("chat", ["other"], "chat-2"),
        ("chat", ["chat-blue"], "chat-2"),
    ],
)
def test_a_successor_has_a_name_of_its_own(name: str, taken: list[str], becomes: str) -> None:
    application = ServeApplicationSchema(
        name=name, import_path="cluster.app:build", route_prefix=None, args={"shards": 3}
    )
    new = successor(application, taken)
    assert new.name == becomes
    assert new.name not in taken
    assert new.args == {"shards": 3, "take_over": True}
    assert application.args == {"shards": 3}


def test_a_port_on_which_somebody_listens_is_not_free() -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        problem = port_problem("127.0.0.1", port)
        assert problem is not None
        assert "in use" in problem
    assert port_problem("127.0.0.1", port) is None


def test_an_address_that_is_not_ours_is_a_problem() -> None:
    assert port_problem("192.0.2.77", 0) is not None


def test_the_new_router_must_be_where_the_old_one_is() -> None:
    check_place(parse_config({"shards": 3}), parse_config({}))
    with pytest.raises(ConfigurationError, match="router_port is 1 and of what serves 8700"):
        check_place(parse_config({"router_port": 1}), parse_config({}))


def test_take_over_is_true_or_false() -> None:
    assert parse_config({"take_over": True}).take_over
    with pytest.raises(ConfigurationError, match="take_over is 1; it must be true or false"):
        parse_config({"take_over": 1})
