"""The sdist and the wheel are complete, and the wheel works away from the checkout."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it and nothing else."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def ours(*folders: str) -> set[str]:
    """What the checkout has in these folders."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_sdist_has_all_it_takes_to_build_and_to_test(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert ours("oki_trace", "migrations", "dashboard", "tests", "docs", "scripts") <= names
    assert {"README.md", "LICENSE", "SECURITY.md", "constraints.txt", "alembic.ini"} <= names
    # What lies about in a checkout stays there: stores, models, environments.
    assert [name for name in names if name.startswith("data/")] == ["data/.gitkeep"]
    assert not [n for n in names if n.startswith((".venv", ".git/")) or "__pycache__" in n]


def test_wheel_carries_what_a_checkout_has(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    bundled = "oki_trace/_bundled"
    assert f"{bundled}/alembic.ini" in names
    assert f"{bundled}/.streamlit/config.toml" in names
    assert {f"{bundled}/{name}" for name in ours("migrations", "dashboard")} <= names
    assert ours("oki_trace") <= names
    assert "oki_trace/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``oki-trace`` in a venv that has our dependencies by path, but not the checkout."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    places = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", places))
    scripts = Path(sysconfig.get_path("scripts", "venv", places))
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", wheel], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # After its own site-packages, so that an editable oki_trace among them does not come first;
    # a path file there is not read from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = subprocess.run(
        [python, "-c", "import oki_trace; print(oki_trace.__file__)"],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(),
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    return scripts / ("oki-trace.exe" if os.name == "nt" else "oki-trace")


def environment() -> dict[str, str]:
    """Without what would lead to the checkout, or to a store elsewhere."""
    away = ("PYTHONPATH", "VIRTUAL_ENV", "OKI_TRACE_DB", "OKI_TRACE_MODEL")
    return {name: value for name, value in os.environ.items() if name not in away}


@pytest.mark.slow
def test_installed_it_does_all_it_says_from_another_folder(
    installed: Path, tmp_path: Path, smollm2_dir: Path
) -> None:
    """What someone does who has the wheel and the README: each command as it stands there."""
    model = str(smollm2_dir)

    def oki(*arguments: str) -> str:
        done = subprocess.run(
            [installed, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment()
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    assert oki("--version") == f"oki-trace {PROJECT['version']}\n"
    oki("migrate")
    assert (tmp_path / "data" / "oki_trace.db").is_file()
    prompt = "What is the capital of France?"
    done = json.loads(oki("run", prompt, "--model", model, "--max-new-tokens", "4", "--json"))
    assert (done["conversation"], done["message"], done["steps"]) == (1, 2, 4)
    assert prompt in oki("list")
    assert json.loads(oki("ask", "settle", "--json"))["rows"]
    oki("export", "--conversation", "1", "--tensors", "--output", "paris.json")
    oki("export", "--conversation", "1", "--format", "html", "--output", "paris.html")
    assert done["output"] in (tmp_path / "paris.html").read_text(encoding="utf-8")
    oki("import", "paris.json", "--db", "elsewhere.db")
    assert "No problems found" in oki("verify", "--db", "elsewhere.db")
    oki("export", "-c", "1", "--tensors", "-o", "again.json", "--db", "elsewhere.db")
    for suffix in (".json", ".safetensors"):
        one, two = (tmp_path / f"{name}{suffix}" for name in ("paris", "again"))
        assert one.read_bytes() == two.read_bytes()
    port = free_port()
    serving = subprocess.Popen(
        [installed, "ui", "--port", str(port)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(lambda: answers(port) or serving.poll() is not None, "the explorer to answer")
        assert serving.poll() is None, serving.stdout and serving.stdout.read().decode()
        assert b"<html" in page(port)
    finally:
        serving.terminate()
        serving.communicate(timeout=40)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def page(port: int) -> bytes:
    """The explorer's first page. Not by urllib: it would ask a proxy that is named."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().read()


def answers(port: int) -> bool:
    try:
        return bool(page(port))
    except (OSError, http.client.HTTPException):
        return False


def test_the_minimum_is_what_is_declared() -> None:
    """constraints-minimum.txt, with which the declared bounds can be tried, has them all."""
    lines = (ROOT / "constraints-minimum.txt").read_text(encoding="utf-8").splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    asked = [re.split("[;,]", line)[0].strip() for line in PROJECT["dependencies"]]
    assert pins == {line.replace(">=", "==") for line in asked}


def test_each_python_that_is_declared_is_named() -> None:
    own = "Programming Language :: Python :: 3."
    named = [int(c.removeprefix(own)) for c in PROJECT["classifiers"] if c.startswith(own)]
    assert PROJECT["requires-python"] == f">=3.{min(named)}"
    assert named == list(range(min(named), max(named) + 1)) and sys.version_info.minor in named


def test_constraints_hold_every_dependency_at_one_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), pins
    pinned = {_canonical(pin.partition("==")[0]) for pin in pins}
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names = {_canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0]) for line in asked}
    assert names <= pinned


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_readme_names_the_test_command_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test-command -->\n```\w*\n(.+?)\n```", readme, re.DOTALL)
    assert block is not None
    assert "-m pytest" in block[1]
    assert "-c constraints.txt" in block[1]
