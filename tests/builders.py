"""Random but valid records, for any test that needs a trace without a model."""

from __future__ import annotations

import numpy as np

from oki_trace.records import (
    Candidates,
    CapturePolicy,
    CaptureReport,
    Generation,
    LayerAttention,
    Lens,
    Prompt,
    Step,
    Tensor,
    TensorMode,
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
        versions="test",
    )


def turn_start(tensors: TensorMode = "exact", tokens: int = 6, layers: int = 3) -> TurnStart:
    return TurnStart("tiny/model", prompt(tokens), generation(), report(tensors, layers))


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


def tensors(
    rng: np.random.Generator,
    *,
    layers: int = 3,
    heads: int = 2,
    keys: int = 7,
    width: int = 8,
    vocab: int = 50,
) -> tuple[Tensor, ...]:
    weights = rng.random((layers, heads, keys)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    return (
        Tensor("logits", rng.normal(size=vocab).astype(np.float32) * 4, "float32"),
        Tensor(
            "hidden_states",
            rng.normal(size=(layers + 1, width)).astype(np.float32) * 20,
            "float32",
            tuple(range(layers + 1)),
        ),
        Tensor("attentions", weights, "float32", tuple(range(1, layers + 1)), 0),
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
        ),
        attention=tuple(attention),
        lens=lens(index, rng, layers=layers, k=topk_lens, vocab=vocab) if with_lens else None,
        tensors=(
            tensors(rng, layers=layers, heads=heads, keys=position + 1, width=width, vocab=vocab)
            if with_tensors
            else ()
        ),
    )
