"""A store of any number of steps, written through the public writer: made-up, but shaped as real.

Replies of 100 steps to prompts of 60 tokens, two in a conversation, by two
models of 30 layers; ten candidates, ten attended positions a layer and five
lens entries a layer, no full tensors. The numbers are random, the lens the
closer to the last layer the better. A pool of steps is made once and used
again and again: writing takes as long as with new ones.
"""

from __future__ import annotations

import dataclasses
import datetime as dt

import numpy as np

from oki_trace.records import (
    Candidates,
    CapturePolicy,
    CaptureReport,
    ChatMessage,
    Generation,
    LayerAttention,
    Lens,
    ModelChoice,
    Prompt,
    Role,
    Sampling,
    Segment,
    Status,
    Step,
    TensorRecord,
    TurnEnd,
    TurnStart,
)
from oki_trace.store.writing.writer import TraceWriter

LAYERS = 30
STEPS = 100
POOL = 400
_VOCABULARY = [f" word{i}" if i % 5 else f"part{i}" for i in range(2000)]
_QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name three rivers.")
_BEGAN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_POLICY = CapturePolicy(tensors="none")
_PROMPT = 60
_HEADS = 9
_VOCAB = 49_152
_SEGMENTS: tuple[Segment, ...] = (
    ("template",) * 4 + ("system",) * 16 + ("template",) * 4 + ("user",) * 32 + ("template",) * 4
)


def fill(writer: TraceWriter, steps: int, *, seed: int = 0) -> None:
    """Add ``steps`` steps (a multiple of 200) to the store."""
    rng = np.random.default_rng(seed)
    pool = [_step(rng) for _ in range(POOL)]
    for number in range(steps // (2 * STEPS)):
        when = _BEGAN + dt.timedelta(hours=number)
        conversation = writer.create_conversation(f"conversation {number}", created_at=when)
        for turn in range(2):
            question = _QUESTIONS[(number + turn) % len(_QUESTIONS)]
            writer.add_message(conversation, ChatMessage(Role.USER, question), created_at=when)
            _reply(
                writer,
                conversation,
                number,
                when,
                [pool[i] for i in rng.integers(POOL, size=STEPS)],
            )


def fill_pairs(writer: TraceWriter, prompts: int, *, seed: int = 0) -> None:
    """Add ``prompts`` prompts, put to both models, which never part; with full logits and
    attention, as 16-bit floats. The second's logits are the first's with some noise.
    """
    rng = np.random.default_rng(seed)
    pool = [_step(rng) for _ in range(STEPS)]
    logits = [rng.gumbel(size=_VOCAB).astype(np.float32) * 2 for _ in range(STEPS // 4)]
    for number in range(prompts):
        order = rng.permutation(STEPS)
        for model in range(2):
            conversation = writer.create_conversation(f"prompt {number}")
            writer.add_message(conversation, ChatMessage(Role.USER, f"question {number}"))
            steps = []
            for index, place in enumerate(order.tolist()):
                noise = rng.normal(size=_VOCAB).astype(np.float32) * 0.1 * model
                weights = rng.dirichlet(np.full(_PROMPT + index, 0.1), size=(LAYERS, _HEADS))
                steps.append(
                    dataclasses.replace(
                        pool[place],
                        tensors=(
                            TensorRecord("logits", logits[place % len(logits)] + noise, "float32"),
                            TensorRecord(
                                "attentions",
                                weights.astype(np.float32),
                                "float32",
                                tuple(range(1, LAYERS + 1)),
                            ),
                        ),
                    )
                )
            _reply(writer, conversation, model, _BEGAN, steps, CapturePolicy(tensors="half"))


def _reply(
    writer: TraceWriter,
    conversation: int,
    number: int,
    when: dt.datetime,
    steps: list[Step],
    policy: CapturePolicy = _POLICY,
) -> None:
    model = ("smollm2", "other/model")[number % 2]
    sampling = Sampling(temperature=(None, 0.7)[number % 2], seed=number % 5)
    reply = writer.queue_reply(
        conversation, ModelChoice(model), sampling, policy, claim=True, created_at=when
    )
    writer.start_reply(reply, _start(model, sampling, policy))
    placed = [_at(step, index) for index, step in enumerate(steps)]
    for first in range(0, STEPS, 25):
        writer.append(reply, placed[first : first + 25])
    said = "".join(step.token for step in placed)
    writer.finish_reply(reply, TurnEnd(Status.COMPLETE, said, "end of turn", 4.0))


def _start(model: str, sampling: Sampling, policy: CapturePolicy) -> TurnStart:
    tokens = tuple(_VOCABULARY[i] for i in range(_PROMPT))
    return TurnStart(
        model,
        Prompt("".join(tokens), tuple(range(_PROMPT)), tokens, _SEGMENTS),
        Generation(
            do_sample=not sampling.is_greedy,
            max_new_tokens=256,
            temperature=sampling.temperature,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            seed=sampling.seed,
            eos_token_ids=(0,),
        ),
        CaptureReport(
            policy=policy,
            layers=LAYERS,
            width=576,
            dtype="float32",
            device="cpu",
            quantization=None,
            evidence_provenance="attention of the final layer, heads averaged",
            attention_layers=tuple(range(1, LAYERS + 1)),
            attention_check=1e-6,
            logit_lens_available=True,
            lens_reason=None,
            lens_check=1e-5,
            versions="synthetic",
        ),
    )


def _at(step: Step, index: int) -> Step:
    """The pooled step as step ``index`` of a reply: it looks at what there is by then."""
    assert step.lens is not None
    here = _PROMPT + index
    attention = tuple(
        dataclasses.replace(one, positions=one.positions % here) for one in step.attention
    )
    return dataclasses.replace(
        step,
        step_index=index,
        position=here,
        attention=attention,
        lens=dataclasses.replace(step.lens, step_index=index),
    )


def _step(rng: np.random.Generator) -> Step:
    sharpness = rng.uniform(0.5, 4.0)
    logits = -np.sort(-rng.gumbel(size=10) * sharpness).astype(np.float32)
    probs = np.exp(logits) / (np.exp(logits).sum() * 1.2)
    ids = rng.choice(len(_VOCABULARY), size=10, replace=False)
    attention = []
    for layer in range(1, LAYERS + 1):
        weights = -np.sort(-rng.dirichlet(np.full(12, 0.4)))[:10].astype(np.float32)
        others = rng.choice(np.arange(1, _PROMPT), size=9, replace=False)
        attention.append(LayerAttention(layer, np.concatenate(([0], others)), weights))
    return Step(
        step_index=0,
        position=0,
        token_id=int(ids[0]),
        token=_VOCABULARY[ids[0]],
        token_bytes=_VOCABULARY[ids[0]].encode(),
        is_special=False,
        logit=float(logits[0]),
        prob=float(probs[0]),
        logprob=float(np.log(probs[0])),
        entropy=float(-(probs * np.log(probs)).sum() + 0.5),
        rank=1,
        margin=float(probs[0] - probs[1]),
        sampled_prob=None,
        elapsed_ms=40.0,
        topk=Candidates(ids, tuple(_VOCABULARY[i] for i in ids), logits, probs),
        attention=tuple(attention),
        lens=_lens(rng, ids, probs),
    )


def _lens(rng: np.random.Generator, ids: np.ndarray, probs: np.ndarray) -> Lens:
    settled = int(rng.integers(10, LAYERS + 1))
    token_ids = rng.integers(0, len(_VOCABULARY), size=(LAYERS + 1, 5))
    token_ids[settled:] = ids[:5]
    spread = rng.dirichlet(np.full(6, 0.5), size=LAYERS + 1)[:, :5]
    lens_probs = -np.sort(-spread, axis=1).astype(np.float32)
    lens_probs[-1] = probs[:5]
    rank = rng.integers(2, 2000, size=LAYERS + 1)
    rank[settled:] = 1
    return Lens(
        step_index=0,
        token_ids=token_ids,
        tokens=tuple(tuple(_VOCABULARY[i] for i in row) for row in token_ids),
        logits=np.log(lens_probs + 1e-9),
        probs=lens_probs,
        entropy=np.linspace(9, 1, LAYERS + 1).astype(np.float32),
        chosen_rank=rank,
        chosen_prob=np.where(rank == 1, lens_probs[:, 0], 0.001).astype(np.float32),
        kl=np.linspace(8, 0, LAYERS + 1).astype(np.float32),
    )
