"""What is published installs and works with the declared floors alone."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_inference import ScriptedInference

pytest_plugins = ["scripted_fixtures"]

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Installation:
    """The wheel, and a virtual environment of it and its floors."""

    wheel: Path
    binaries: Path
    home: Path

    def run(self, program: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment outside the repository."""
        return subprocess.run(
            [self.binaries / program, *arguments],
            cwd=self.home,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )


def floors() -> list[str]:
    """The lowest versions that the project says it works with."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = [requirement.replace(">=", "==") for requirement in project["dependencies"]]
    assert all(requirement.count("==") == 1 for requirement in pinned)
    return pinned


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    home = tmp_path_factory.mktemp("installation")
    build = [sys.executable, "-m", "build", "--outdir", str(home), str(REPOSITORY)]
    subprocess.run(build, check=True)
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", with_pip=True)
    installed = Installation(wheel, home / "venv" / "bin", home)
    result = installed.run("pip", "install", "--quiet", str(wheel), *floors())
    assert result.returncode == 0, result.stderr
    return installed


def test_the_wheel_holds_the_packages_and_nothing_else(installation: Installation) -> None:
    with zipfile.ZipFile(installation.wheel) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops - {"pyramidserve", "cluster", "workers"} == {
        "-".join(installation.wheel.name.split("-")[:2]) + ".dist-info"
    }
    assert {"pyramidserve", "cluster", "workers"} <= tops
    assert {"pyramidserve/py.typed", "pyramidserve/v1/inference_pb2.pyi"} <= set(names)
    page = "cluster/http/page_files"
    assert {f"{page}/{file.name}" for file in (REPOSITORY / page).iterdir()} <= set(names)


def test_the_floors_are_what_is_installed(installation: Installation) -> None:
    assert set(floors()) <= set(installation.run("pip", "freeze").stdout.split())


def test_importing_needs_no_server_side(installation: Installation) -> None:
    program = "import sys, pyramidserve; print(*{'torch', 'ray'} & set(sys.modules), 'done')"
    result = installation.run("python", "-W", "error", "-c", program)
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_help_lists_every_command(installation: Installation) -> None:
    result = installation.run("pyramidserve", "--help")
    assert result.returncode == 0
    for command in ("chat", "state", "serve", "demo", "trace"):
        assert f"\n    {command} " in result.stdout


def test_chat_answers(
    installation: Installation, scripted: ScriptedInference, scripted_target: str
) -> None:
    result = installation.run("pyramidserve", "chat", "--target", scripted_target, stdin="hello there\n")
    assert (result.returncode, result.stdout) == (0, "hello there\n")
    assert scripted.requests[0].chat.messages[0].content == "hello there"


def test_serve_says_what_to_install(installation: Installation) -> None:
    result = installation.run("pyramidserve", "serve")
    assert result.returncode == 1
    assert result.stderr == "pyramidserve serve needs the server side: pip install 'pyramidserve[server]'\n"
