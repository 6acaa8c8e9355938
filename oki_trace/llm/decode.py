"""The decoding loop: one step out per token, with the tensors it was chosen by.

It knows nothing of text, of the store or of what is kept. ``generate()`` does
the preparation (generation config, logits processors, stopping criteria, the
right cache for the model) and hands over to the loop below through its
``custom_generate`` argument, so that every setting means what it means there
and greedy tokens are its tokens.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError
from oki_trace.llm.anatomy import input_device
from oki_trace.llm.probe import Probe
from oki_trace.records import Generation, Sampling


@dataclass(frozen=True)
class RawStep:
    """One decoded token and the tensors of its forward pass, still on their devices.

    ``logits`` (vocab,) the model's own, in its dtype; ``scores`` (vocab,) fp32
    after the processors, None when they changed nothing; ``hidden`` L+1 rows
    (width,), before the final norm; ``attention`` (heads, keys) by layer.
    ``finished`` names the stop this token met, or is None.
    """

    step_index: int
    position: int
    token_id: int
    logits: Tensor
    scores: Tensor | None
    hidden: tuple[Tensor, ...]
    attention: dict[int, Tensor]
    elapsed_ms: float
    finished: str | None


def generation_of(model: Any, sampling: Sampling, prompt_len: int) -> Generation:
    """The settings in force for this model: what was asked, else its generation config.

    A reply that samples without a seed gets one, so that it can be had again.
    Raises CaptureError when the prompt leaves no room in the model's context.
    """
    config = model.generation_config
    room = context_length(model) - prompt_len
    if room < 1:
        raise CaptureError(
            f"The prompt has {prompt_len:,} tokens, but the model's context holds "
            f"{context_length(model):,}. Shorten the prompt or start a new conversation."
        )
    eos = config.eos_token_id
    sampled = not sampling.is_greedy
    return Generation(
        do_sample=sampled,
        max_new_tokens=min(sampling.max_new_tokens, room),
        temperature=sampling.temperature if sampled else None,
        top_p=_either(sampling.top_p, config.top_p) if sampled else None,
        top_k=_either(sampling.top_k, config.top_k) if sampled else None,
        repetition_penalty=_either(sampling.repetition_penalty, config.repetition_penalty),
        seed=_either(sampling.seed, secrets.randbelow(2**31)) if sampled else None,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),)),
    )


def context_length(model: Any) -> int:
    """The most tokens the model can see, from its config; very large when it has no limit."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _either(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def decode(
    model: Any, probe: Probe, prompt_ids: tuple[int, ...], generation: Generation
) -> Generator[RawStep]:
    """Decode from ``prompt_ids`` with the KV cache, a step at a time.

    Close the iterator to stop early. Raises CaptureError on NaN or infinite
    logits.
    """
    input_ids = torch.tensor([prompt_ids], device=input_device(model))
    settings = {
        name: value
        for name, value in (
            ("temperature", generation.temperature),
            ("top_p", generation.top_p),
            ("top_k", generation.top_k),
            ("repetition_penalty", generation.repetition_penalty),
        )
        if value is not None
    }
    steps: Generator[RawStep] = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=generation.do_sample,
        max_new_tokens=generation.max_new_tokens,
        custom_generate=_loop,
        probe=probe,
        seed=generation.seed,
        **settings,
    )
    return steps


@torch.no_grad()
def _loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    probe: Probe,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Generator[RawStep]:
    prompt_len = input_ids.shape[1]
    generator = torch.Generator(device=input_ids.device)
    if seed is not None:
        generator.manual_seed(seed)
    with probe.attached(), model._optimize_model_for_decode():
        for step_index in range(generation_config.max_length - prompt_len):
            started = time.perf_counter()
            # 1. the model's own forward pass, watched
            whole = step_index == 0
            if whole and probe.splits_prompt and prompt_len > 1:
                model_kwargs = _all_but_last(model, input_ids, generation_config, model_kwargs)
                whole = False
            with probe.asking() as arguments:
                if whole:
                    asked = {**model_kwargs, **arguments}
                    outputs = model._prefill(input_ids, generation_config, asked)
                else:
                    inputs = model.prepare_inputs_for_generation(
                        input_ids,
                        next_sequence_length=1 if model_kwargs["use_cache"] else None,
                        **model_kwargs,
                    )
                    outputs = model(**{**inputs, **arguments}, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = outputs.logits[0, -1].clone()
            attention = probe.take_attention(outputs)
            del outputs
            # 2. what the sampling settings make of its distribution
            raw = logits.to(input_ids.device, torch.float32)[None]
            _refuse_broken(raw, step_index)
            scores = logits_processor(input_ids, raw.clone()) if logits_processor else raw
            # 3. the choice
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                chosen = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, chosen], dim=-1)
            token_id = int(chosen)
            done = bool(stopping_criteria(input_ids, ()).all())
            elapsed_ms = (time.perf_counter() - started) * 1e3
            yield RawStep(
                step_index=step_index,
                position=prompt_len + step_index,
                token_id=token_id,
                logits=logits,
                scores=None if scores is raw else scores[0],
                hidden=probe.take_hidden(),
                attention=attention,
                elapsed_ms=elapsed_ms,
                finished=_stop_reason(token_id, generation_config) if done else None,
            )
            if done:
                return


def _all_but_last(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Put the prompt but for its last token into the cache; the arguments to go on with."""
    mask = model_kwargs.get("attention_mask")
    before = model_kwargs if mask is None else {**model_kwargs, "attention_mask": mask[:, :-1]}
    outputs = model._prefill(input_ids[:, :-1], generation_config, before)
    updated: dict[str, Any] = model._update_model_kwargs_for_generation(outputs, before)
    return updated


def _refuse_broken(logits: Tensor, step_index: int) -> None:
    total = float(logits.logsumexp(-1))
    if total != total or total in (float("inf"), float("-inf")):
        raise CaptureError(
            f"The model's logits are not finite at step {step_index}. "
            "Load it with --dtype float32, or with other weights."
        )


def _stop_reason(token_id: int, generation_config: Any) -> str:
    eos = generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return "end of turn" if token_id in ids else "token limit"
