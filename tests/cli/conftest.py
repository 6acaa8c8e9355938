"""Runs the command line in this process where that is enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from oki_trace.cli import main
from tests import models
from tests.cli.commands import Done, Oki, start


@pytest.fixture
def oki(capfd: pytest.CaptureFixture[str]) -> Oki:
    """``oki-trace`` with these arguments, in this process; both outputs are pipes to it."""

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        code = leaving.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, out, err)

    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_endless(tmp_path_factory.mktemp("models") / "endless")


@dataclass(frozen=True)
class Demo:
    """What ``oki-trace demo --no-ui`` wrote, and the store it left."""

    done: Done
    db: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Demo:
    """The demo with the real model, run once. Leave its store as it is."""
    db = tmp_path_factory.mktemp("demo") / "demo.db"
    return Demo(start("demo", "--no-ui", "--db", db), db)
