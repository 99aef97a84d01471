"""The page for browsers: its files as they are served, and the state that it shows."""

import asyncio
import re
from pathlib import Path
from typing import Any, get_args

from fake_head import hello
from policy_package import installed_policies
from served_router import run, site

from cluster.front.tenants import Tenant, Tenants
from cluster.http.page import FOLDER, PAGES
from pyramidserve.types import Recall
from workers.policies.registry import BUILT_IN, enable

KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
TENANTS = Tenants({"a-token": Tenant("a")})


def test_its_files_are_served_to_everybody() -> None:
    async def whole() -> None:
        async with site(tenants=TENANTS) as at, at.http() as client:
            for file in FOLDER.iterdir():
                reply = await client.get(PAGES.get(file.name, f"/page/{file.name}"))
                assert reply.status_code == 200, file
                assert reply.content == file.read_bytes()
                assert reply.headers["content-type"] == KINDS[file.suffix[1:]]
                assert reply.headers["cache-control"] == "no-cache"
                assert reply.headers["content-security-policy"].startswith("default-src 'self'; ")
            for missing in ("/page/", "/page/index.html", "/page/..%2Fpage.py", "/page/other.js"):
                reply = await client.get(missing)
                assert reply.status_code == 404
                assert reply.json()["error"]["code"] == "no_such_route"

    run(whole)


def test_it_asks_for_files_that_there_are() -> None:
    pages = "".join((FOLDER / page).read_text() for page in PAGES)
    asked = set(re.findall(r'(?:href|src)="page/([^"]+)"', pages))
    for file in FOLDER.glob("*.js"):
        asked |= set(re.findall(r'from "\./([^"]+)"', file.read_text()))
    assert asked | set(PAGES) == {file.name for file in FOLDER.iterdir()}


def test_it_has_nothing_that_the_guard_keeps_browsers_from() -> None:
    for page in PAGES:
        assert not re.search(r"<style|\s(style|on\w+)=|<script(?![^>]* src=)", (FOLDER / page).read_text())


def test_what_is_said_becomes_no_markup() -> None:
    for file in FOLDER.glob("*.js"):
        assert not re.search(r"(inner|outer)HTML|insertAdjacentHTML|DOMParser|\beval\(", file.read_text())


def test_it_offers_all_ways_of_recall() -> None:
    index = (FOLDER / "index.html").read_text()
    offered = {
        name: re.findall(r"<option>(.+)</option>", options)
        for name, options in re.findall(r'<select id="(\w+)">(.*?)</select>', index, re.DOTALL)
    }
    assert offered == {"policy": [], "recall": list(get_args(Recall))}


def test_it_is_told_of_all_policies_those_of_other_packages_too(tmp_path: Path) -> None:
    code = """
from dataclasses import replace
from workers.policies import full

POLICY = replace(full.POLICY, name="mine")
"""

    async def policies() -> list[str]:
        async with site() as at, at.http() as client:
            told: list[str] = (await client.get("/v1/cluster")).json()["policies"]
            return told

    built_in = asyncio.run(policies())
    named = [
        f"{policy.name}/{prefill}" if prefill else policy.name
        for policy in BUILT_IN
        for prefill in policy.prefills or ("",)
    ]
    assert built_in == [*named, "auto"]
    with installed_policies(tmp_path, "mine", code, {"mine": "POLICY"}):
        enable(["mine"])
        assert asyncio.run(policies()) == [*built_in, "mine"]


def test_the_state_of_the_cluster() -> None:
    async def whole() -> None:
        async with site() as at, at.http() as client:
            empty = (await client.get("/v1/cluster")).json()
            assert empty | {"decisions": {}, "policies": []} == {
                "model": "toy",
                "queued": 0,
                "running": 0,
                "queue_limit": 4,
                "sessions": 0,
                "pipelines": [],
                "policies": [],
                "decisions": {},
            }
            introduction = hello(pages=(8, 6))
            introduction.stages[1].tensor_names.append("model.norm.weight")
            async with at.head(introduction):
                (pipeline,) = (await client.get("/v1/cluster")).json()["pipelines"]
                assert pipeline["pipeline_id"] == "p"
                stages: list[dict[str, Any]] = pipeline["stages"]
                assert [each["pages_total"] for each in stages] == [8, 6]
                assert [each["pages_reserved"] for each in stages] == at.reserved()
                assert all("tensor_names" not in each for each in stages)

    run(whole)


def test_the_state_wants_a_token() -> None:
    async def whole() -> None:
        async with site(tenants=TENANTS) as at:
            async with at.http() as client:
                refused = await client.get("/v1/cluster")
                assert refused.status_code == 401
                assert "the bearer token is missing" in refused.json()["error"]["message"]
            async with at.http(authorization="Bearer a-token") as client:
                assert (await client.get("/v1/cluster")).json()["model"] == "toy"

    run(whole)
