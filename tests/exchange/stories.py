"""Stores with a conversation to export: every kind of message, hostile text, odd numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Part,
    Role,
    Sampling,
    Status,
    Step,
    TemplateOptions,
    TensorMode,
    TensorRecord,
    TurnEnd,
)
from oki_trace.store.writing.writer import TraceWriter
from tests import builders

HOSTILE = "\x1b[31m </script><script>alert(1)</script> <!-- \u202e rtl é 日本 🙂 \u2028 ]]> ' \""


def odd_step(index: int, rng: np.random.Generator) -> Step:
    """NaN, half a character, no lens, an empty list, tensors of 16 bits."""
    step = builders.step(index, rng)
    nothing = np.array([math.nan, 0.5], dtype=np.float32)
    bits = rng.integers(0, 2**15, size=50).astype(np.uint16)
    return replace(
        step,
        token="\ufffd",
        token_bytes=b"\xf0\x9f",
        is_special=True,
        entropy=math.nan,
        elapsed_ms=math.nan,
        rank=7,
        topk=replace(
            step.topk,
            token_ids=step.topk.token_ids[:2],
            tokens=step.topk.tokens[:2],
            logits=nothing,
            probs=nothing,
            sampled_probs=None,
            noise=None,
        ),
        attention=(),
        decision=None,
        tensors=(TensorRecord("logits", bits, "bfloat16"),),
    )


TEMPLATE = TemplateOptions(
    {"enable_thinking": False, "documents": [{"title": HOSTILE, "text": ""}]},
    ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},),
)


def parts_of(steps: int) -> tuple[Part, ...]:
    """Thinking, a call and an answer, on so many steps."""
    first, second = min(1, steps), min(2, steps)
    arguments = {HOSTILE: [1, 2.5, None, True, HOSTILE, {}], "n": 2**40}
    return (
        Part("thinking", HOSTILE, 0, first),
        Part("tool_call", "{}", first, second, "f", arguments),
        Part("answer", "", second, steps),
    )


def fill(db: Path, *, steps: int = 3, tensors: TensorMode = "half") -> int:
    """A store with one conversation; returns its id."""
    rng = np.random.default_rng(5)
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation(f"About {HOSTILE}")

        def queue() -> int:
            return writer.queue_reply(
                conversation,
                ModelChoice("tiny/model", use_4bit=True),
                Sampling(16, 0.7, seed=3),
                CapturePolicy(tensors=tensors),
                claim=True,
                template=TEMPLATE,
            )

        writer.add_message(conversation, ChatMessage(Role.SYSTEM, "Be brief."))
        writer.add_message(conversation, ChatMessage(Role.USER, HOSTILE))
        reply = queue()
        writer.start_reply(reply, builders.turn_start(tensors))
        made: list[Step] = [
            builders.step(i, rng, with_lens=True, token=(" the", "\n", HOSTILE)[i % 3])
            for i in range(steps)
        ]
        # A lens may have been applied to some of the steps.
        made[1:2] = [builders.read_by(step, rng) for step in made[1:2]]
        writer.append(reply, [*made, odd_step(steps, rng)])
        end = TurnEnd(Status.COMPLETE, HOSTILE, "end of turn", 1.5, parts=parts_of(steps + 1))
        writer.finish_reply(reply, end)
        writer.add_message(conversation, ChatMessage(Role.USER, "again"))
        failed = queue()
        writer.finish_reply(failed, TurnEnd(Status.FAILED, "", "No such model.", 0.0))
        writer.add_message(conversation, ChatMessage(Role.USER, "and again"))
        by_hand = ChatMessage(
            Role.ASSISTANT, "said by hand", (Part("answer", "said by hand"), *parts_of(0))
        )
        writer.add_message(conversation, by_hand)
        reply = queue()
        writer.start_reply(reply, builders.turn_start(tensors))
        writer.append(reply, [builders.step(0, rng, with_lens=True, token="é")])
        writer.finish_reply(reply, TurnEnd(Status.STOPPED, "é", "stopped", 0.25))
    return conversation


def fill_given(db: Path, *, tensors: TensorMode = "half") -> int:
    """A conversation of a reply whose prompt is traced, and of a scored text; returns its id."""
    rng = np.random.default_rng(7)
    with_tensors = tensors != "none"
    policy = CapturePolicy(tensors=tensors, trace_prompt="full")
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("given")
        writer.add_message(conversation, ChatMessage(Role.USER, HOSTILE))
        for tokens, steps in ((6, 3), (70, 0)):
            reply = writer.queue_reply(
                conversation, ModelChoice("tiny/model"), Sampling(16), policy, claim=True
            )
            start = builders.turn_start(tensors, tokens)
            windows = None if steps else (32, 16)
            capture = replace(start.capture, policy=policy, windows=windows)
            writer.start_reply(reply, replace(start, capture=capture))
            # The beginning of the reply's prompt is traced by an earlier turn.
            given = [
                builders.given_step(at, rng, tokens=tokens, with_tensors=with_tensors)
                for at in range(3 if steps else 1, tokens)
            ]
            writer.append(reply, given)
            made = [builders.step(i, rng, with_tensors=with_tensors) for i in range(steps)]
            writer.append(reply, [replace(made[0], origin="forced"), *made[1:]] if made else [])
            writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "scored", 1.5))
    return conversation


def fill_two_turns(db: Path) -> int:
    """Two traced turns: the second prompt is the first one, its reply and a token."""
    rng = np.random.default_rng(7)
    policy = CapturePolicy(tensors="none", trace_prompt="full")
    with TraceWriter(db) as writer:
        conversation = writer.create_conversation("two turns")
        prompt = builders.prompt(6)
        for last in (False, True):
            writer.add_message(conversation, ChatMessage(Role.USER, "hello"))
            reply = writer.queue_reply(
                conversation, ModelChoice("tiny/model"), Sampling(16), policy, claim=True
            )
            start = builders.turn_start("none")
            capture = replace(start.capture, policy=policy)
            writer.start_reply(reply, replace(start, capture=capture, prompt=prompt))
            first, tokens = (len(prompt) - 1, len(prompt)) if last else (1, 6)
            given = [
                replace(
                    builders.given_step(at, rng, tokens=tokens),
                    token_id=prompt.token_ids[at],
                    token=prompt.tokens[at],
                )
                for at in range(first, tokens)
            ]
            made = [builders.step(i, rng, prompt_len=tokens, with_tensors=False) for i in range(3)]
            writer.append(reply, [*given, *made])
            writer.finish_reply(reply, TurnEnd(Status.COMPLETE, "x", "end of turn", 1.5))
            prompt = replace(
                prompt,
                token_ids=(*prompt.token_ids, *(step.token_id for step in made), 5),
                tokens=(*prompt.tokens, *(step.token for step in made), "!"),
                segments=(*prompt.segments, *("assistant" for _ in made), "user"),
            )
    return conversation


def v1_trace(steps: int = 3, **changes: Any) -> dict[str, Any]:
    """A trace of version 1: texts without ids, evidence in the prompt and the reply."""
    words = [" Paris", " is", "."]
    return {
        "model_id": "some/model",
        "prompt": "<|user|>Capital of France?<|assistant|>",
        "output": "".join(words[:steps]),
        "prompt_len": 6,
        "messages": [{"role": "user", "content": "Capital of France?"}],
        "evidence_provenance": "last_layer_mean_heads",
        "logit_lens_available": True,
        "steps": [
            {
                "step": index,
                "chosen_token": words[index],
                "chosen_id": 40 + index,
                "logits_topk": [
                    {"token": words[index], "prob": 0.75},
                    {"token": " the", "prob": 0.125},
                ],
                "evidence": [
                    {
                        "token": " France",
                        "weight": 0.5,
                        "position": 3,
                        "in_prompt": True,
                        "relative": None,
                    },
                    *(
                        [
                            {
                                "token": words[0],
                                "weight": 0.25,
                                "position": 6,
                                "in_prompt": False,
                                "relative": 0,
                            }
                        ]
                        if index
                        else []
                    ),
                ],
                "logit_lens": [
                    {
                        "layer": layer,
                        "topk": [
                            {"token": words[index] if layer == 2 else " x", "prob": 0.5},
                            {"token": " y", "prob": 0.25},
                        ],
                    }
                    for layer in range(3)
                ],
            }
            for index in range(steps)
        ],
    }
