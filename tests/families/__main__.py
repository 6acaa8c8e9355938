"""``python -m tests.families`` examines every model type and writes docs/architectures.md."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings

import torch
import transformers

from tests.families import page
from tests.families.configs import MODEL_TYPES
from tests.families.examine import examine


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    outcomes = []
    for model_type in MODEL_TYPES:
        # Some models print, and warn, about arguments that generate() gives to all.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            outcome = examine(model_type)
        outcomes.append(outcome)
        print(model_type, *page.cells(outcome), sep=" | ", file=sys.stderr)
    page.PATH.parent.mkdir(exist_ok=True)
    page.PATH.write_text(page.write(outcomes), encoding="utf-8")


main()
