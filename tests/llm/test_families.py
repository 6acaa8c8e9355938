"""docs/architectures.md agrees with a new run, model type by model type."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import transformers

from oki_trace.records import ModelChoice, Sampling
from oki_trace.store.reading.reader import TraceReader
from oki_trace.store.writing.recorder import Recorder
from oki_trace.store.writing.writer import TraceWriter
from oki_trace.tracing import Collector
from tests.families import configs, page
from tests.families.examine import POLICY, TOKENS, Outcome, examine

TOLERANCE = 1e-4
CONSTRAINTS = page.PATH.parents[1] / "constraints.txt"

# Of transformers about its own configs and caches, not of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    before, level = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TraceWriter, TraceReader]]:
    file = tmp_path_factory.mktemp("families") / "store.db"
    with TraceWriter(str(file)) as writer, TraceReader(str(file)) as reader:
        yield writer, reader


@pytest.fixture(scope="module")
def seen() -> dict[str, Outcome]:
    """The findings of this run."""
    return {}


def rows() -> dict[str, list[str]]:
    """The page's table: cells by model type."""
    lines = page.PATH.read_text(encoding="utf-8").splitlines()
    table = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if "|" in line
    ]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in table[2:]}


@pytest.mark.parametrize("model_type", configs.MODEL_TYPES)
def test_a_model_type_is_traced_as_the_page_says(
    model_type: str, store: tuple[TraceWriter, TraceReader], seen: dict[str, Outcome]
) -> None:
    kept, recorder, message = Collector(), *_recorder(store[0])
    outcome = seen[model_type] = examine(model_type, kept, recorder)
    for error in (outcome.lens_error, outcome.attention_error):
        assert error is None or error <= TOLERANCE
    if outcome.reason is None:
        assert outcome.greedy and outcome.sampled
    _assert_same(rows()[model_type], list(page.cells(outcome)))
    if kept.started is not None:
        _assert_stored(store[1], message, kept)


def _recorder(writer: TraceWriter) -> tuple[Recorder, int]:
    conversation = writer.create_conversation("families")
    message = writer.queue_reply(
        conversation, ModelChoice("tiny"), Sampling(TOKENS), POLICY, claim=True
    )
    return Recorder(writer, message), message


def _assert_same(shown: list[str], found: list[str]) -> None:
    """Only the errors may differ, by a factor of ten at most, as on another CPU."""
    assert [_without_error(cell) for cell in shown] == [_without_error(cell) for cell in found], (
        f"docs/architectures.md is not current: run `{page.COMMAND}`"
    )
    for before, now in zip(shown, found, strict=True):
        if "≤" in now:
            # In whole powers of ten, which ten times their tenth is not exactly.
            assert float(now.rpartition("≤")[2]) < 11 * float(before.rpartition("≤")[2])


def _without_error(cell: str) -> str:
    return cell.partition("≤")[0] + ("≤" if "≤" in cell else "")


def _assert_stored(reader: TraceReader, message: int, kept: Collector) -> None:
    """The store returns what the model side recorded."""
    assert kept.ended is not None
    assert reader.message(message).status is kept.ended.status
    back = list(reader.iter_steps(message))
    assert [step.token_id for step in back] == [step.token_id for step in kept.steps]
    assert [step.lens is not None for step in back] == [bool(kept.lenses)] * len(back)
    for step, own in zip(back, kept.steps, strict=True):
        assert [a.layer for a in step.attention] == [a.layer for a in own.attention]
        for tensor in own.tensors:
            stored = reader.tensor(message, step.step_index, tensor.name)
            assert stored.layers == tensor.layers or tensor.name == "hidden_states"
            assert (stored.array == tensor.array).all()


def test_the_totals_are_of_these_rows(seen: dict[str, Outcome]) -> None:
    if len(seen) < len(configs.MODEL_TYPES):
        pytest.skip("needs every model type of this module to have run")
    shown = page.PATH.read_text(encoding="utf-8").partition("\n| type")[0]
    found = re.search(r"transformers ([\d.]+),", shown)
    assert found is not None
    assert f"transformers=={found[1]}\n" in CONSTRAINTS.read_text(encoding="utf-8")
    if transformers.__version__ != found[1]:
        pytest.skip(f"the totals are of transformers {found[1]}, which has other types")
    assert shown == page.write(seen.values()).partition("\n| type")[0]
