"""Random but valid records, for any test that needs a trace without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from oki_trace.records import (
    Candidates,
    CapturePolicy,
    CaptureReport,
    Contender,
    Decision,
    Effect,
    Generation,
    LayerAttention,
    LayerRouting,
    Lens,
    Prompt,
    Step,
    StepSummary,
    TensorMode,
    TensorRecord,
    TurnStart,
)

WORDS = (" the", " cat", "<b>", "\n", "é", "🙂", "\u202e", "", " a")


def prompt(tokens: int = 6) -> Prompt:
    return Prompt(
        text="<|user|>hello world<|assistant|>",
        token_ids=tuple(range(100, 100 + tokens)),
        tokens=tuple(WORDS[i % len(WORDS)] for i in range(tokens)),
        segments=tuple("template" if i % 3 == 0 else "user" for i in range(tokens)),
    )


def generation() -> Generation:
    return Generation(
        do_sample=True,
        max_new_tokens=16,
        temperature=0.7,
        top_p=0.9,
        top_k=None,
        repetition_penalty=None,
        seed=3,
        eos_token_ids=(0, 2),
    )


def report(tensors: TensorMode = "exact", layers: int = 3, width: int = 8) -> CaptureReport:
    return CaptureReport(
        policy=CapturePolicy(tensors=tensors),
        layers=layers,
        width=width,
        dtype="float32",
        device="cpu",
        quantization=None,
        evidence_provenance="attention of the final layer, heads averaged",
        attention_layers=tuple(range(1, layers + 1)),
        attention_check=1e-6,
        logit_lens_available=True,
        lens_reason=None,
        lens_check=2e-6,
        lens_draft=2e-5,
        versions="test",
    )


def turn_start(tensors: TensorMode = "exact", tokens: int = 6, layers: int = 3) -> TurnStart:
    return TurnStart("tiny/model", prompt(tokens), generation(), report(tensors, layers))


def given_step(
    position: int, rng: np.random.Generator, *, tokens: int = 6, with_tensors: bool = False
) -> Step:
    """The step of a token of ``prompt(tokens)``."""
    shape = {"prompt_len": tokens, "vocab": 200}
    own = step(position - tokens, rng, **shape, with_tensors=with_tensors, with_lens=True)
    assert own.lens is not None
    given = prompt(tokens)
    return replace(
        own,
        step_index=-1,
        token_id=given.token_ids[position],
        token=given.tokens[position],
        token_bytes=given.tokens[position].encode(),
        origin="given",
        sampled_prob=None,
        decision=None,
        lens=replace(own.lens, step_index=-1),
        topk=replace(own.topk, sampled_probs=None, noise=None),
    )


def lens(
    index: int, rng: np.random.Generator, *, layers: int = 3, k: int = 5, vocab: int = 50
) -> Lens:
    logits = -np.sort(-rng.normal(size=(layers + 1, k)), axis=1).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    token_ids = rng.integers(0, vocab, size=(layers + 1, k))
    return Lens(
        step_index=index,
        token_ids=token_ids,
        tokens=tuple(tuple(WORDS[i % len(WORDS)] for i in row) for row in token_ids),
        logits=logits,
        probs=probs.astype(np.float32),
        entropy=rng.random(layers + 1).astype(np.float32),
        chosen_rank=rng.integers(1, 4, size=layers + 1),
        chosen_prob=rng.random(layers + 1).astype(np.float32),
        kl=rng.random(layers + 1).astype(np.float32),
    )


def reading(
    name: str, of: Lens, rng: np.random.Generator, layers: tuple[int, ...] | None = None
) -> Lens:
    """Another lens at the same step, which reads these layers, or all; the last is the same."""
    rows = [*range(len(of.entropy))] if layers is None else [*layers]
    probs = of.probs[rows] * rng.uniform(0.5, 0.9, size=(len(rows), 1)).astype(np.float32)
    probs[-1] = of.probs[-1]
    ratio = probs[:, :1] / of.probs[rows][:, :1]
    return Lens(
        step_index=of.step_index,
        token_ids=of.token_ids[rows],
        tokens=tuple(of.tokens[row] for row in rows),
        logits=of.logits[rows],
        probs=probs,
        entropy=np.append(rng.random(len(rows) - 1).astype(np.float32), of.entropy[-1]),
        chosen_rank=of.chosen_rank[rows],
        chosen_prob=of.chosen_prob[rows] * ratio[:, 0],
        kl=np.append(rng.random(len(rows) - 1), 0).astype(np.float32),
        name=name,
        layers=None if layers is None else np.array(layers),
    )


def routing(rng: np.random.Generator, *, layers: int = 3, k: int = 2) -> tuple[LayerRouting, ...]:
    """``k`` of the eight experts of every layer."""
    weights = np.array([0.5**rank for rank in range(1, k + 1)], dtype=np.float32)
    return tuple(
        LayerRouting(layer, rng.choice(8, size=k, replace=False), weights)
        for layer in range(1, layers + 1)
    )


def read_by(step: Step, rng: np.random.Generator) -> Step:
    """The step with readings by two lenses, one of which lacks a layer, and with experts."""
    assert step.lens is not None
    lenses = (
        reading("jlens", step.lens, rng, (1, 3)),
        reading("tuned-1.0", step.lens, rng),
    )
    return replace(step, lenses=lenses, router=routing(rng))


def decision(chosen_id: int, greedy_id: int) -> Decision:
    """A draw of one token where greedy decoding would have said another."""
    return Decision(
        drawn=True,
        effects=(
            Effect("temperature", "0.7", 0, 0.0, 0.4),
            Effect("top-p", "0.9", 38, 0.08, 0.5),
        ),
        candidates=12,
        noise=2.25,
        greedy=Contender(greedy_id, " greedy", 0.3, -0.5),
        runner_up=Contender(chosen_id + 1, "\u202e", 0.01, 3.5),
    )


def tensors(
    rng: np.random.Generator,
    *,
    layers: int = 3,
    heads: int = 2,
    keys: int = 6,
    width: int = 8,
    vocab: int = 50,
) -> tuple[TensorRecord, ...]:
    weights = rng.random((layers, heads, keys)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    return (
        TensorRecord("logits", rng.normal(size=vocab).astype(np.float32) * 4, "float32"),
        TensorRecord(
            "hidden_states",
            rng.normal(size=(layers + 1, width)).astype(np.float32) * 20,
            "float32",
            tuple(range(layers + 1)),
        ),
        TensorRecord("attentions", weights, "float32", tuple(range(1, layers + 1)), 0),
    )


def step(
    index: int,
    rng: np.random.Generator,
    *,
    prompt_len: int = 6,
    layers: int = 3,
    heads: int = 2,
    width: int = 8,
    vocab: int = 50,
    topk: int = 10,
    topk_attention: int = 4,
    topk_lens: int = 5,
    token: str = " the",
    with_lens: bool = False,
    with_tensors: bool = True,
) -> Step:
    """Step ``index`` of a reply to a prompt of ``prompt_len`` tokens."""
    position = prompt_len + index
    k = min(topk_attention, position)
    token_ids = rng.choice(vocab, size=min(topk, vocab), replace=False)
    logits = -np.sort(-rng.normal(size=len(token_ids))).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum()
    attention = []
    for layer in range(1, layers + 1):
        weights = -np.sort(-rng.random(k)).astype(np.float32)
        attention.append(
            LayerAttention(
                layer=layer,
                positions=rng.choice(position, size=k, replace=False),
                weights=weights / (weights.sum() + 1),
                missing=0.25,
            )
        )
    return Step(
        step_index=index,
        position=position,
        token_id=int(token_ids[0]),
        token=token,
        token_bytes=token.encode("utf-8", errors="surrogatepass"),
        is_special=False,
        logit=float(logits[0]),
        prob=float(probs[0]),
        logprob=float(np.log(probs[0])),
        entropy=float(-(probs * np.log(probs)).sum()),
        rank=1,
        margin=float(probs[0] - probs[1]),
        sampled_prob=0.5,
        elapsed_ms=12.5,
        topk=Candidates(
            token_ids=token_ids,
            tokens=tuple(WORDS[i % len(WORDS)] for i in token_ids),
            logits=logits,
            probs=probs.astype(np.float32),
            sampled_probs=probs.astype(np.float32),
            noise=rng.gumbel(size=len(token_ids)).astype(np.float32),
        ),
        attention=tuple(attention),
        lens=lens(index, rng, layers=layers, k=topk_lens, vocab=vocab) if with_lens else None,
        decision=decision(int(token_ids[0]), int(token_ids[1])),
        tensors=(
            tensors(rng, layers=layers, heads=heads, keys=position, width=width, vocab=vocab)
            if with_tensors
            else ()
        ),
    )


def coherent_step(
    index: int,
    rng: np.random.Generator,
    *,
    prompt_len: int = 6,
    layers: int = 3,
    heads: int = 2,
    width: int = 8,
    vocab: int = 50,
    topk: int = 10,
    token: str = " the",
) -> Step:
    """A step whose rows all follow from its full tensors, as those of a model do."""
    position = prompt_len + index
    full = tensors(rng, layers=layers, heads=heads, keys=position, width=width, vocab=vocab)
    by_layer = rng.normal(size=(layers + 1, vocab)).astype(np.float32) * 2
    by_layer[-1] = full[0].array
    probs = np.exp(by_layer - by_layer.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(-by_layer, axis=1)
    ids = order[-1, :topk]
    chosen = int(ids[1])
    mean = full[2].array.mean(axis=1)
    attention = []
    for layer in range(layers):
        positions = np.argsort(-mean[layer])[:4]
        attention.append(
            LayerAttention(
                layer + 1,
                positions,
                mean[layer][positions],
                max(0.0, 1.0 - float(mean[layer].sum())),
            )
        )
    entropy = -(probs * np.log(probs)).sum(axis=1)
    lens_ids = order[:, :5]
    return Step(
        step_index=index,
        position=position,
        token_id=chosen,
        token=token,
        token_bytes=token.encode(),
        is_special=False,
        logit=float(by_layer[-1, chosen]),
        prob=float(probs[-1, chosen]),
        logprob=float(np.log(probs[-1, chosen])),
        entropy=float(entropy[-1]),
        rank=2,
        margin=float(probs[-1, ids[0]] - probs[-1, ids[1]]),
        sampled_prob=0.5,
        elapsed_ms=12.5,
        topk=Candidates(
            ids, tuple(WORDS[i % len(WORDS)] for i in ids), by_layer[-1, ids], probs[-1, ids]
        ),
        attention=tuple(attention),
        lens=Lens(
            step_index=index,
            token_ids=lens_ids,
            tokens=tuple(tuple(WORDS[i % len(WORDS)] for i in row) for row in lens_ids),
            logits=np.take_along_axis(by_layer, lens_ids, axis=1),
            probs=np.take_along_axis(probs, lens_ids, axis=1),
            entropy=entropy.astype(np.float32),
            chosen_rank=1 + (by_layer > by_layer[:, [chosen]]).sum(axis=1),
            chosen_prob=probs[:, chosen],
            kl=rng.random(layers + 1).astype(np.float32),
        ),
        tensors=full,
    )


def summary(index: int = 0, token: str = " the", **values: Any) -> StepSummary:
    """A step without its details, as the reader lists it."""
    given: dict[str, Any] = {
        "id": index + 1,
        "step_index": index,
        "position": 6 + index,
        "token_id": 40 + index,
        "token": token,
        "token_bytes": token.encode(errors="surrogatepass"),
        "is_special": False,
        "prob": 0.5,
        "logprob": float(np.log(0.5)),
        "entropy": 1.5,
        "rank": 1,
        "margin": 0.25,
        "settle_layer": 2,
    }
    return StepSummary(**{**given, **values})
