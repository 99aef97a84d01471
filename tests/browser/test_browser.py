"""The page in headless Chromium: `make browser`; screenshots are left in build/browser."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_process import RunningCluster, free_port, running_cluster
from environments import python_with
from served_router import site

from cluster.front.tenants import Tenant, Tenants

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

LAYERS = 30  # of the embedded model
PROGRAM = Path(__file__).parent / "with_playwright.py"
OUT = Path(__file__).parents[2] / "build" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def command() -> list[str]:
    """How the program is run, but for what it is to do, and where."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: install one, or name it in CHROMIUM")
    return [str(python_with(OUT / "playwright", ["playwright"])), str(PROGRAM), found, str(OUT)]


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, embedded: Path, command: list[str]
) -> Iterator[RunningCluster]:
    folder = tmp_path_factory.mktemp("browser")
    with running_cluster(folder, dtype="float32", shards=2, http_port=free_port()) as cluster:
        yield cluster


def kill_router(cluster: RunningCluster) -> None:
    """Kills the process that listens for HTTP, in whose place Serve starts another."""
    port = int(cluster.http.rpartition(":")[2])
    connections = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (router,) = (each.pid for each in connections if each.laddr and each.laddr.port == port)
    assert router is not None
    os.kill(router, signal.SIGKILL)


@pytest.fixture(scope="module")
def seen(cluster: RunningCluster, command: list[str]) -> dict[str, Any]:
    """What there was to see of conversations during which the router was killed once."""
    with subprocess.Popen([*command, "chat", cluster.http], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "restart\n"
        kill_router(cluster)
        told: dict[str, Any] = json.loads(program.stdout.read())
    return told


def test_nothing_goes_wrong_that_nobody_provoked(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["violations"] == []


def test_a_reply_streams(seen: dict[str, Any]) -> None:
    grown = sorted(set(seen["lengths"]) - {0})
    assert len(grown) > 5
    assert grown[-1] >= len(seen["reply"]) > 0


def test_the_pyramid_has_a_row_for_each_layer(seen: dict[str, Any]) -> None:
    assert seen["rows"] == LAYERS
    device = seen["device"]
    assert 100 > device[0] > device[-1] > 0
    assert device == sorted(device, reverse=True)
    assert {"kv_keep reached", "Time to first token", "pyramid/evict"} <= set(seen["receipt"])


def test_the_pyramid_grows_with_the_reply(seen: dict[str, Any]) -> None:
    said = "Layer 0: ([0-9]+) on the device of ([0-9]+)"
    plans = [re.fullmatch(said, each) for each in dict.fromkeys(seen["plans"])]
    counts = [(int(each[1]), int(each[2])) for each in plans if each]
    assert len(counts) == len(plans) > 5
    assert [tokens for _, tokens in counts] == sorted({tokens for _, tokens in counts})
    assert all(device < tokens for device, tokens in counts)
    # What is planned for the prompt is what the receipt says of it.
    of_prompt = re.search("([0-9]+) of the prompt", seen["foot"])
    assert of_prompt
    assert int(of_prompt[1]) <= counts[0][0] <= int(of_prompt[1]) + 8


def test_the_policies_are_those_of_the_cluster(seen: dict[str, Any]) -> None:
    assert seen["offered"] == ["as deployed", *seen["policies"]]
    assert "pyramid/evict" in seen["policies"]


def test_a_second_message_goes_on_with_the_first(seen: dict[str, Any]) -> None:
    reused, _, prompt = seen["reused"].partition(" of ")
    assert 0 < int(reused) < int(prompt)


def test_what_is_said_stays_text(seen: dict[str, Any]) -> None:
    assert seen["said"].startswith("<img src=x onerror=")
    assert "</script>" in seen["said"]
    assert seen["elements"] == 0
    assert seen["title"] == "PyramidServe"


def test_the_charts_have_lines(seen: dict[str, Any]) -> None:
    first: dict[str, str] = {}
    for chart, line in seen["lines"]:
        first.setdefault(chart, line)
    # Requests, and of both stages the pages and what the host has.
    assert len(first) == 5
    for line in first.values():
        points = [point.split(" ") for point in line.removeprefix("M").split("L")]
        assert len(points) > 5
        assert len({height for _, height in points}) > 1


def test_the_api_is_described(seen: dict[str, Any]) -> None:
    assert {"messages", "tools", "compression"} <= set(seen["documented"])


def test_it_is_light_dark_and_narrow(seen: dict[str, Any]) -> None:
    assert seen["light"] != seen["dark"]
    assert seen["overflow"] <= 0
    assert {"light.png", "dark.png", "narrow.png"} <= {each.name for each in OUT.iterdir()}


def test_errors_are_the_server_s_words(seen: dict[str, Any]) -> None:
    assert "policy 'full' keeps everything" in seen["problem"]
    assert seen["again"] == "Is that allowed?"


def test_a_reply_is_stopped(seen: dict[str, Any]) -> None:
    assert seen["note"] == "stopped"


def test_it_outlives_its_router(seen: dict[str, Any]) -> None:
    assert seen["away"] == "not reachable"
    assert seen["kept"]
    assert seen["second"]


def test_a_new_conversation_leaves_nothing_of_the_old_one(
    seen: dict[str, Any], cluster: RunningCluster
) -> None:
    assert (seen["ended"], seen["left"]) == (200, "")
    cluster.check_empty()


def test_a_token_is_asked_for(command: list[str]) -> None:
    async def whole() -> dict[str, Any]:
        async with site(tenants=Tenants({"a-token": Tenant("a")})) as at, at.head():
            url = f"http://127.0.0.1:{at.server.http_ports[0]}"
            program = await asyncio.create_subprocess_exec(*command, "token", url, stdout=subprocess.PIPE)
            said, _ = await program.communicate()
            told: dict[str, Any] = json.loads(said)
            return told

    told = asyncio.run(whole())
    assert "the bearer token is not known" in told["problem"]
    assert not told["asks"]
    assert not told["asks_again"]
