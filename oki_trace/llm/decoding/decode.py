"""The decoding loop: one step per token, with the tensors from which it was chosen.

This module knows nothing about text, the store or the capture policy. ``generate()`` does
the preparation (generation config, logits processors, stopping criteria, the
right cache for the model) and calls the loop below as its ``custom_generate``, so
every setting keeps its meaning and greedy decoding gives the same tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oki_trace.errors import CaptureError
from oki_trace.llm.accelerate_internals import moves_weights
from oki_trace.llm.decoding.forward import Forward
from oki_trace.llm.decoding.forward_pass import FastPaths, ForwardHooks, ForwardPass
from oki_trace.llm.decoding.generation import (
    find_stop_reason,
    generate_arguments,
    generate_method,
)
from oki_trace.llm.decoding.sampling import Choice, choose, force
from oki_trace.llm.loading.hardware import input_device
from oki_trace.llm.transformers_internals import optimized_for_decoding
from oki_trace.records import Generation, Origin

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RawStep(ForwardPass):
    """One decoded token and the tensors of its forward pass, still on their devices.

    ``logits`` are before the sampling settings, ``choice`` after them. ``stop_reason``
    is that of the last token, else None.
    """

    step_index: int
    position: int
    token_id: int
    choice: Choice
    elapsed_ms: float
    stop_reason: str | None
    origin: Origin = "sampled"


def decode(
    model: Any,
    tokenizer: Any,
    hooks: ForwardHooks,
    fast: FastPaths,
    prompt_ids: tuple[int, ...],
    generation: Generation,
    note: Callable[[str], None] = log.debug,
    forced: Sequence[int] = (),
    reused: int | None = None,
) -> Generator[RawStep]:
    """Decode from ``prompt_ids`` with the KV cache, a step at a time.

    ``note`` receives a sentence about each fast path that was given up. ``forced``: the
    tokens of the first steps, whatever the model would choose; random numbers are drawn for
    the steps after them only, as if they were in the prompt. ``reused``: so many tokens of the
    prompt are in the cache of the last reply, and this reply's is kept for the next; None
    leaves that cache alone. Close the iterator to stop early.
    Raises CaptureError on NaN or infinite logits, and when the sampling settings leave
    no token.
    """
    # The settings are prepared as for a prompt that contains the forced tokens: some of them
    # count the new tokens, or look at the prompt's.
    input_ids = torch.tensor([[*prompt_ids, *forced]], device=input_device(model))
    cache = None if reused is None else fast.take_prefix(reused)
    steps: Generator[RawStep] = generate_method(model)(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        custom_generate=_grad_mode(model)(_loop),
        hooks=hooks,
        fast=fast,
        seed=generation.seed,
        note=note,
        forced=forced,
        keeps_cache=reused is not None,
        **({} if cache is None else {"past_key_values": cache}),
        limit=generation.max_new_tokens,
        # generate() refuses 0, which is a reply of forced tokens alone.
        **generate_arguments(
            replace(generation, max_new_tokens=max(generation.max_new_tokens, 1)), model, tokenizer
        ),
    )
    return steps


def _grad_mode(model: Any) -> Any:
    """Inference mode, which skips autograd's bookkeeping, where no tensor outlives the reply.

    Code from elsewhere may keep tensors on the model, which could then not be
    trained any more, and weights that are moved in it would be such tensors.
    """
    known = type(model).__module__.startswith("transformers.")
    return torch.inference_mode() if known and not moves_weights(model) else torch.no_grad()


def _loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    hooks: ForwardHooks,
    fast: FastPaths,
    seed: int | None,
    note: Callable[[str], None],
    forced: Sequence[int],
    keeps_cache: bool,
    limit: int,
    **model_kwargs: Any,
) -> Generator[RawStep]:
    whole_len = input_ids.shape[1]
    prompt_len = whole_len - len(forced)
    input_ids = input_ids[:, :prompt_len]
    for name, value in model_kwargs.items():  # such as the attention mask
        if forced and isinstance(value, Tensor) and value.shape[-1:] == (whole_len,):
            model_kwargs[name] = value[..., :prompt_len]
    generator = None
    if generation_config.do_sample:
        generator = torch.Generator(device=input_ids.device)
        if seed is not None:
            generator.manual_seed(seed)
    new_tokens = len(forced) + limit
    forward = Forward(model, hooks, fast, generation_config, model_kwargs, new_tokens, note)
    is_whole = False  # whether the cache has all tokens but the last
    with hooks.attach(), optimized_for_decoding(model):
        try:
            for step_index in range(new_tokens):
                started = time.perf_counter()
                is_whole = False
                # 1. The model's forward pass. Its tensors are taken before the processors run:
                # some of them run the model once more.
                forward_pass = forward(input_ids)
                # 2. The choice from its distribution, by the sampling settings.
                logits = forward_pass.logits.to(input_ids.device, torch.float32)[None]
                _require_finite(logits, step_index)
                is_forced = step_index < len(forced)
                if is_forced:
                    choice = force(forced[step_index], logits)
                else:
                    choice = choose(logits_processor, input_ids, logits, generator)
                input_ids = torch.cat([input_ids, choice.token], dim=-1)
                token_id = int(choice.token)
                # 3. Whether the reply ends here.
                is_last = step_index + 1 == new_tokens
                if step_index + 1 < len(forced):
                    done = False
                else:
                    done = is_last or bool(stopping_criteria(input_ids, ()).all())
                length = generation_config.max_length if is_last else input_ids.shape[1]
                elapsed_ms = (time.perf_counter() - started) * 1e3
                is_whole = True
                yield RawStep(
                    **vars(forward_pass),
                    step_index=step_index,
                    position=prompt_len + step_index,
                    token_id=token_id,
                    choice=choice,
                    elapsed_ms=elapsed_ms,
                    stop_reason=find_stop_reason(token_id, length, generation_config)
                    if done
                    else None,
                    origin="forced" if is_forced else "sampled",
                )
                if done:
                    return
        finally:
            if keeps_cache and is_whole:
                forward.keep(input_ids)


def _require_finite(logits: Tensor, step_index: int) -> None:
    # One NaN makes the largest NaN; it is infinite where the softmax is undefined.
    if not float("-inf") < float(logits.max()) < float("inf"):
        raise CaptureError(
            f"The model's logits are not finite at step {step_index}. "
            "Load it with --dtype float32, or with other weights."
        )
