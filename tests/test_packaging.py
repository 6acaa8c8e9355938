"""The wheel: it carries the migrations and the explorer, and works from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("dist")
    names = PROJECT["readme"], "LICENSE", "pyproject.toml", "alembic.ini"
    for name in names:
        shutil.copy(ROOT / name, source / name)
    for name in ("oki_trace", "migrations", "dashboard", ".streamlit"):
        ignore = shutil.ignore_patterns("_bundled")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_carries_what_a_checkout_has(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    bundled = "oki_trace/_bundled"
    assert f"{bundled}/alembic.ini" in names
    assert f"{bundled}/.streamlit/config.toml" in names
    for folder in ("migrations", "dashboard"):
        ours = {
            f"{bundled}/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert ours and ours <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "oki_trace").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


@pytest.mark.slow
def test_installed_wheel_migrates_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In a venv that has our dependencies by path but not the checkout."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    places = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", places))
    scripts = Path(sysconfig.get_path("scripts", "venv", places))
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    installed = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", wheel], capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    # After its own site-packages, so that an editable oki_trace among them does not come first;
    # a path file there is not read from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["OKI_TRACE_DB"] = str(elsewhere / "store.db")
    where = subprocess.run(
        [python, "-c", "import oki_trace; print(oki_trace.__file__)"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env=environment,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    script = scripts / ("oki-trace.exe" if os.name == "nt" else "oki-trace")
    done = subprocess.run(
        [script, "migrate"], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "store.db").is_file()


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
