"""``lens``: adds, lists, removes, and reads stored conversations as the live run reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from oki_trace.api import run_traced
from oki_trace.apply_lens import apply_lens
from oki_trace.llm.lenses import library
from oki_trace.records import TensorMode
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.writer import TraceWriter
from tests.cli.commands import Oki
from tests.llm.test_lenses import jacobian_file, tuned_folder

WIDTH, LAYERS = 576, 30


@pytest.fixture
def lenses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Jacobian lens and a Tuned Lens for SmolLM2, installed for this test alone."""
    folder = tmp_path / "lenses"
    monkeypatch.setattr(library, "lenses_dir", lambda: folder)
    library.add(str(jacobian_file(tmp_path / "a.pt", WIDTH, LAYERS)), "jacobian")
    library.add(str(tuned_folder(tmp_path / "b", WIDTH, LAYERS)), "tuned")
    return folder


@pytest.mark.usefixtures("lenses", "smollm2_dir")
@pytest.mark.parametrize("mode", ["exact", "half", "compact"])
def test_stored_states_are_read_as_live_ones(mode: TensorMode, tmp_path: Path) -> None:
    names = ("jacobian", "tuned")
    options = {"max_new_tokens": 4, "trace_prompt": "full", "tensors": mode}
    live, later = tmp_path / "live.db", tmp_path / "later.db"
    run_traced("The capital of France is", db=live, lenses=names, **options)
    run_traced("The capital of France is", db=later, **options)
    with TraceWriter(later) as writer, TraceReader(later) as reader:
        for name in names:
            stops = iter([False] * 5 + [True])
            part = apply_lens(writer, reader, name, should_stop=lambda: next(stops))  # noqa: B023
            assert (part.stopped, part.steps) == (True, 6)
            rest = apply_lens(writer, reader, name, 1)
            assert not rest.stopped and not rest.refused and rest.loaded_blocks == 1
            assert apply_lens(writer, reader, name).steps == 0
    with TraceReader(live) as reader, TraceReader(later) as again:
        for given in (True, False):
            pairs = zip(
                reader.iter_steps(2, given=given), again.iter_steps(2, given=given), strict=True
            )
            for one, other in pairs:
                for own, read in zip(one.lenses, other.lenses, strict=True):
                    assert (own.name, own.layer_numbers.tolist()) == (
                        read.name,
                        read.layer_numbers.tolist(),
                    )
                    tolerance = {"exact": 1.1e-3, "half": 5e-3, "compact": 0.1}[mode]
                    assert np.abs(own.chosen_prob - read.chosen_prob).max() < tolerance
                    assert own.token_ids[-1].tolist() == read.token_ids[-1].tolist()
                    assert own.probs[-1].tolist() == read.probs[-1].tolist()
                    same_best = (own.token_ids[:, 0] == read.token_ids[:, 0]).mean()
                    assert same_best > (0.8 if mode == "compact" else 0.93)


def test_lenses_from_the_command_line(oki: Oki, tmp_path: Path) -> None:
    path = jacobian_file(tmp_path / "Other_jacobian_lens.pt", 8, 3)
    name = "test-of-the-command-line"
    try:
        done = oki("lens", "add", path, "--name", name)
        assert done.status == 0 and "a Jacobian lens for Other (width 8, 3 layers)" in done.out
        listed = json.loads(oki("lens", "list", "--json").out)
        (own,) = [one for one in listed if one["name"] == name]
        assert (own["kind"], own["layers"], own["fitted"]["prompts"]) == ("jacobian", [1, 2], 10)
        again = oki("lens", "add", path, "--name", name)
        assert again.status == 2 and "installed already" in again.err
    finally:
        done = oki("lens", "remove", name)
    assert (done.status, done.out) == (0, f"Removed {name}.\n")
    gone = oki("lens", "remove", name)
    assert gone.status == 2 and f"No lens {name} is installed" in gone.err
    refused = oki("run", "hi", "--lens", name)
    assert refused.status == 2 and f"No lens {name} is installed" in refused.err


@pytest.mark.parametrize("arguments", [(), ("--all", "--conversation", "1")])
def test_apply_needs_to_know_what(oki: Oki, arguments: tuple[str, ...]) -> None:
    done = oki("lens", "apply", "x", *arguments)
    assert (done.status, done.err) == (
        2,
        "oki-trace: Give exactly one of --conversation and --all.\n",
    )
