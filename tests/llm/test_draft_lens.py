"""The drafted lens against the full one: exact values stay exact, the others within a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oki_trace.llm.capture.distribution import model_distribution
from oki_trace.llm.capture.instrument import Instrument, forget, instrument
from oki_trace.llm.capture.lens import DRAFT_TOLERANCE, LensTarget, LogitLens
from oki_trace.llm.capture.model_structure import find_structure
from oki_trace.llm.fast import draft_lens as module
from oki_trace.llm.fast.draft_lens import MAX_TOP_K, DraftLens, DraftProjection, NoDraft, draft_lens
from oki_trace.records import CapturePolicy, ChatMessage, Lens, ReplyChecks, Role, Sampling
from oki_trace.tracing import Collector, trace_turn
from tests import tiny
from tests.families import configs

LARGE = 16_384
LAYERS = 3
NONE_WANTED = torch.zeros(0, dtype=torch.long)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, also where it would be too slow to be worthwhile."""
    monkeypatch.setattr(module, "has_native_bfloat16", lambda: True)


def large(model_type: str = "llama", **changes: Any) -> Any:
    return configs.build(model_type, **{"vocab_size": LARGE, "hidden_size": 64, **changes})


def found(model: Any, streams: torch.Tensor | None = None) -> DraftLens | None:
    structure = find_structure(model)
    hidden = torch.randn(LAYERS, 64, dtype=model.dtype) if streams is None else streams
    try:
        return draft_lens(LogitLens(structure), structure, list(hidden))
    except NoDraft:
        return None


def lenses(made: Instrument, policy: CapturePolicy, sampling: Sampling) -> list[Lens]:
    kept = Collector()
    asked = [ChatMessage(Role.USER, "Write a story about a lighthouse keeper and the sea.")]
    trace_turn(made, "smollm2", asked, sampling, policy, [kept])
    assert kept.started is not None and kept.started.capture.lens_check is not None
    error = kept.started.capture.lens_draft
    if policy.tensors == "exact":
        assert error is None
    else:
        assert error is not None and 0 < error <= DRAFT_TOLERANCE / 2
    return kept.lenses


@pytest.mark.parametrize(
    "sampling", [Sampling(12), Sampling(12, temperature=1.3, seed=5)], ids=["greedy", "sampled"]
)
def test_a_real_reply_with_and_without_a_draft(
    smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    model, tokenizer = smollm2
    forget(model)  # what others found of it is of this machine
    made = instrument(model, tokenizer)
    forget(model)
    drafted = lenses(made, CapturePolicy(), sampling)
    whole = lenses(made, CapturePolicy(tensors="exact"), sampling)
    assert len(drafted) == len(whole) == 12
    for one, other in zip(drafted, whole, strict=True):
        assert (one.token_ids == other.token_ids).all()
        assert one.settle_layer == other.settle_layer
        assert one.logits == pytest.approx(other.logits, abs=1e-4, rel=1e-5)
        assert np.abs(one.probs - other.probs).max() <= DRAFT_TOLERANCE
        assert np.abs(one.chosen_prob - other.chosen_prob).max() <= DRAFT_TOLERANCE
        assert np.abs(one.entropy - other.entropy).max() <= 2e-2
        assert np.abs(one.kl - other.kl).max() <= 2e-2
        near = other.chosen_rank <= 64
        assert (one.chosen_rank[near] == other.chosen_rank[near]).all()
        assert one.chosen_rank == pytest.approx(other.chosen_rank, rel=0.05)
        for name in ("probs", "entropy", "chosen_prob", "kl"):
            assert (getattr(one, name)[-1] == getattr(other, name)[-1]).all(), name


def test_requested_tokens_are_exact_however_unlikely() -> None:
    torch.manual_seed(0)
    model = large()
    drafter = found(model)
    assert drafter is not None
    streams = torch.randn(2 * LAYERS, 64)
    wanted = [torch.tensor([7, 4_001]), torch.tensor([9])]
    drafted = list(drafter.projection().project_steps(streams, wanted, MAX_TOP_K))
    whole = LogitLens(find_structure(model)).project(streams).split(LAYERS)
    for logits, true, ids in zip(drafted, whole, wanted, strict=True):
        assert logits[:, ids].numpy() == pytest.approx(true[:, ids].numpy(), abs=1e-5)
        best, at = true.topk(MAX_TOP_K)
        assert (logits.topk(MAX_TOP_K).indices == at).all()
        assert logits.gather(1, at).numpy() == pytest.approx(best.numpy(), abs=1e-5)
        assert float((logits.softmax(-1) - true.softmax(-1)).abs().max()) <= DRAFT_TOLERANCE


def nearly_one_token(model: Any, streams: torch.Tensor) -> None:
    """All tokens are similar: the best are closer together than bfloat16 can resolve."""
    weight = model.lm_head.weight
    weight.copy_(weight[:1] + 1e-4 * torch.randn_like(weight))


def not_finite(model: Any, streams: torch.Tensor) -> None:
    streams[:] = float("nan")


@pytest.mark.parametrize("spoil", [nearly_one_token, not_finite])
@torch.no_grad()
def test_a_layer_with_an_unsure_draft_is_computed_in_full(
    spoil: Callable[[Any, torch.Tensor], None],
) -> None:
    torch.manual_seed(0)
    model = large(tie_word_embeddings=False)
    drafter = found(model)
    assert drafter is not None
    streams = torch.randn(LAYERS, 64)
    spoil(model, streams)
    (logits,) = drafter.projection().project_steps(streams, [NONE_WANTED], 5)
    whole = LogitLens(find_structure(model)).project(streams)
    torch.testing.assert_close(logits, whole, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_weights_that_changed_between_two_replies() -> None:
    torch.manual_seed(0)
    model = large()
    drafter = found(model)
    assert drafter is not None
    streams = torch.randn(LAYERS, 64)
    for _ in range(2):
        (logits,) = drafter.projection().project_steps(streams, [NONE_WANTED], 5)
        whole = LogitLens(find_structure(model)).project(streams)
        assert float((logits.softmax(-1) - whole.softmax(-1)).abs().max()) <= DRAFT_TOLERANCE
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("phi", {}),  # its head has a bias
        ("llama", {"vocab_size": 300}),
        ("llama", {"dtype": torch.bfloat16}),
    ],
)
def test_a_head_that_is_more_than_a_large_float32_matrix_is_not_drafted(
    model_type: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dtype = changes.get("dtype", torch.float32)
    sizes = {key: value for key, value in changes.items() if key != "dtype"}
    model = configs.build(model_type, **{"vocab_size": LARGE, "hidden_size": 64, **sizes})
    assert found(model.to(dtype)) is None
    assert found(large()) is not None


def test_no_draft_for_exact_tensors_or_many_tokens() -> None:
    made = instrument(large(), tiny.tokenizer())
    assert made.fast.draft_lens is not None
    for policy in (CapturePolicy(tensors="exact"), CapturePolicy(topk_lens=MAX_TOP_K + 1)):
        assert made.draft_for(policy) is None
        assert made.report(policy).lens_draft is None
    assert made.report(CapturePolicy()).lens_draft == made.fast.draft_lens.error


def test_a_reply_compares_its_draft_with_the_full_lens() -> None:
    checks = checked(large())
    assert checks.draft is not None and 0 < checks.draft <= DRAFT_TOLERANCE
    assert checks.fault is None and checks.notes == ()


def test_an_inaccurate_draft_is_dropped_within_the_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = large()
    whole = traced_lenses(model, CapturePolicy(tensors="exact"))
    project = DraftProjection.project_steps

    def off(self: DraftProjection, hidden: Any, exact_ids: Any, k: int) -> Any:
        for found in project(self, hidden, exact_ids, k):
            yield found - 0.5 * (found < found.topk(k).values[:, -1:])

    monkeypatch.setattr(DraftProjection, "project_steps", off)
    assert traced_lenses(model, CapturePolicy()) == whole
    checks = checked(model)
    assert checks.draft is not None and checks.draft > DRAFT_TOLERANCE and checks.fault is None
    assert "from step 0 on the lens was computed in float32 throughout" in checks.notes[0]


def turn(model: Any, policy: CapturePolicy) -> Collector:
    kept = Collector()
    asked = [ChatMessage(Role.USER, "the quick brown fox")]
    made = instrument(model, tiny.tokenizer())
    trace_turn(made, "tiny", asked, Sampling(8), policy, [kept])
    return kept


def checked(model: Any) -> ReplyChecks:
    ended = turn(model, CapturePolicy()).ended
    assert ended is not None and ended.checks is not None
    return ended.checks


def traced_lenses(model: Any, policy: CapturePolicy) -> list[Any]:
    return [[lens.probs.tolist(), lens.kl.tolist()] for lens in turn(model, policy).lenses]


@pytest.mark.parametrize("spoil", [None, nearly_one_token, not_finite])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_the_summary_of_several_steps_is_that_of_their_exact_logits(
    spoil: Callable[[Any, torch.Tensor], None] | None, threads: int
) -> None:
    """Also for a vocabulary that is no whole number of tiles and blocks."""
    torch.manual_seed(0)
    vocab = LARGE + 13
    model = large(tie_word_embeddings=False, vocab_size=vocab)
    drafter = found(model)
    assert drafter is not None
    streams = torch.randn(2 * LAYERS, 64)
    if spoil is not None:
        spoil(model, streams)
    steps = [
        LensTarget(token, model_distribution(torch.randn(vocab) * 4), torch.tensor([5, token]))
        for token in (7, vocab - 1)
    ]
    cores = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drafted = drafter.projection().summarize_steps(streams, steps, 5)
        exact = drafter.lens.summarize_steps(streams, steps, 5)
    finally:
        torch.set_num_threads(cores)
    assert drafted.token_ids.tolist() == exact.token_ids.tolist()
    # The sums over many unlikely tokens are drafted, the best tokens are not.
    tolerances = {"logits": 1e-5, "probs": DRAFT_TOLERANCE, "chosen_prob": DRAFT_TOLERANCE}
    for name, tolerance in {**tolerances, "entropy": 2e-2, "kl": 2e-2}.items():
        values = getattr(drafted, name).numpy(), getattr(exact, name).numpy()
        np.testing.assert_allclose(*values, atol=tolerance, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(drafted.chosen_rank, exact.chosen_rank, rtol=0.05)
