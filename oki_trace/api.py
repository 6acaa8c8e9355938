"""``run_traced``: a trace with one call, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oki_trace.chat_messages import chat_message
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import TraceHead, trace_object
from oki_trace.input_text import checked
from oki_trace.llm.loading.load import load_model_and_tokenizer
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Lens,
    ModelChoice,
    Role,
    Sampling,
    Step,
    TemplateOptions,
    TensorMode,
)
from oki_trace.settings import Settings
from oki_trace.template_options import as_schema
from oki_trace.tracing import Collector, Sink, prepare, trace_turn


def run_traced(
    prompt: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 64,
    model: Any = None,
    tokenizer: Any = None,
    topk_logits: int = 10,
    topk_evidence: int = 10,
    topk_lens: int = 5,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    db: str | os.PathLike[str] | None = None,
    tensors: TensorMode = "half",
    template_args: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Generate a reply; return its text and its trace object.

    Exactly one of ``prompt`` (one user message) and ``messages``
    (``[{"role": …, "content": …}]``) is given. Without ``model`` and
    ``tokenizer`` the default model is loaded. ``db``, a path or SQLAlchemy URL,
    also keeps the conversation in that store; ``tensors`` says how full tensors
    are kept there. ``template_args`` (``enable_thinking``, say) and ``tools``, schemas
    of functions, are for the chat template. Messages may have ``reasoning_content``,
    ``tool_calls`` and the role ``tool``, as ``apply_chat_template`` takes them; when
    the last one is the assistant's, the reply goes on with it. Raises
    UsageError for arguments that make no sense, ModelError when the model cannot be
    loaded or traced.
    """
    turns = _turns(prompt, messages)
    template = TemplateOptions(
        dict(template_args or {}), tuple(as_schema(tool) for tool in tools or ())
    )
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    policy = CapturePolicy(topk_logits, topk_evidence, topk_lens, "none" if db is None else tensors)
    if (model is None) != (tokenizer is None):
        raise UsageError("Give both model and tokenizer, or neither.")
    if model is None:
        model_id = Settings.from_environment().model_id
        model, tokenizer = load_model_and_tokenizer(model_id)
    else:
        model_id = str(getattr(model, "name_or_path", "") or type(model).__name__)
    collector = Collector()

    def trace(*more: Sink) -> None:
        sinks = [collector, *more]
        made = prepare(model, tokenizer, sinks)
        trace_turn(made, model_id, turns, sampling, policy, sinks, template=template)

    if db is None:
        trace()
    else:
        _trace_into(os.fspath(db), model_id, turns, sampling, policy, template, trace)
    return _result(collector, turns, template)


def _turns(
    prompt: str | None, messages: Sequence[Mapping[str, Any]] | None
) -> tuple[ChatMessage, ...]:
    if (prompt is None) == (messages is None):
        raise UsageError("Give exactly one of prompt and messages.")
    given = messages if prompt is None else [{"role": Role.USER, "content": prompt}]
    turns = tuple(chat_message(message) for message in given or ())
    if not turns:
        raise UsageError("There are no messages. Give at least one, or a prompt.")
    for turn in turns:
        checked(turn.content, "What is said")
    return turns


def _trace_into(
    db: str,
    model_id: str,
    turns: Sequence[ChatMessage],
    sampling: Sampling,
    policy: CapturePolicy,
    template: TemplateOptions,
    trace: Callable[..., None],
) -> None:
    # Imported here: a trace that is not kept needs no store.
    from oki_trace.queueing import title_of
    from oki_trace.store.writing.recorder import Recorder
    from oki_trace.store.writing.writer import TraceWriter

    with TraceWriter(db) as writer:
        conversation = writer.create_conversation(title_of(turns[-1].content))
        for turn in turns:
            writer.add_message(conversation, turn)
        reply = writer.queue_reply(
            conversation, ModelChoice(model_id), sampling, policy, claim=True, template=template
        )
        trace(Recorder(writer, reply))


def _result(
    collector: Collector, turns: Sequence[ChatMessage], template: TemplateOptions
) -> tuple[str, dict[str, Any]]:
    start, end = collector.started, collector.ended
    assert start is not None and end is not None
    head = TraceHead(
        model_id=start.model_id,
        prompt=start.prompt,
        generation=start.generation,
        capture=start.capture,
        messages=turns,
        output=end.output,
        status=end.status,
        reason=end.reason,
        checks=end.checks,
        parts=end.parts,
        template=template,
    )
    trace = trace_object(head, _with_lenses(collector.steps, collector.lenses))
    return end.output, trace


def _with_lenses(steps: Sequence[Step], lenses: Sequence[Lens]) -> list[Step]:
    by_step = {lens.step_index: lens for lens in lenses}
    return [replace(step, lens=by_step.get(step.step_index)) for step in steps]
