"""Settings from the environment.

``OKI_TRACE_DB``     path or SQLAlchemy URL of the store (default ``data/oki_trace.db``)
``OKI_TRACE_MODEL``  the default model (default ``smollm2``)
``OKI_TRACE_FAST``   0 switches the optional fast paths off (default 1)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oki_trace.input_text import require_storable

BUILTIN_MODEL = "smollm2"
DEFAULT_DB = "data/oki_trace.db"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a process.

    ``data_dir`` holds converted models and installed lenses, and the worker's lock and log
    for a store that is not a file.
    """

    db: str = DEFAULT_DB
    model_id: str = BUILTIN_MODEL
    data_dir: Path = Path("data")
    fast: bool = True

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; an empty variable counts as unset.

        Raises UsageError for one that is not UTF-8.
        """
        env = os.environ if environ is None else environ
        return cls(
            db=require_storable(env.get("OKI_TRACE_DB") or DEFAULT_DB, "OKI_TRACE_DB"),
            model_id=require_storable(
                env.get("OKI_TRACE_MODEL") or BUILTIN_MODEL, "OKI_TRACE_MODEL"
            ),
            fast=env.get("OKI_TRACE_FAST") not in ("0", "false", "no", "off"),
        )

    @property
    def models_dir(self) -> Path:
        """The folder of the converted built-in model."""
        return self.data_dir / "models"

    @property
    def lenses_dir(self) -> Path:
        """The folder of the installed lenses."""
        return self.data_dir / "lenses"
