"""``run_traced``: generates and traces a reply in one call, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from oki_trace.chat_messages import chat_message
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import TraceHead, trace_object
from oki_trace.llm.chat.template_arguments import refuse_unknown
from oki_trace.llm.loading.load import load_model_and_tokenizer
from oki_trace.queueing import ReplyRequest
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    ModelChoice,
    Role,
    Sampling,
    TemplateOptions,
    TensorMode,
)
from oki_trace.settings import Settings
from oki_trace.template_options import as_schema
from oki_trace.tracing import Collector, prepare, trace_turn


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
    (``[{"role": …, "content": …}]``) is given. Messages may have ``reasoning_content``,
    ``tool_calls`` and the role ``tool``, as ``apply_chat_template`` takes them; if the
    last one is the assistant's, the reply continues it. Without ``model`` and
    ``tokenizer`` the default model is loaded. ``db``, a path or SQLAlchemy URL, also
    stores the conversation there, and ``tensors`` says how its full tensors are stored.
    ``template_args`` (such as ``enable_thinking``) and ``tools``, JSON schemas of
    functions, go to the chat template. Raises UsageError for invalid arguments,
    ModelError when the model cannot be loaded or traced.
    """
    policy = CapturePolicy(topk_logits, topk_evidence, topk_lens, "none" if db is None else tensors)
    if (model is None) != (tokenizer is None):
        raise UsageError("Give both model and tokenizer, or neither.")
    name = getattr(model, "name_or_path", "") or type(model).__name__
    request = ReplyRequest(
        _turns(prompt, messages),
        ModelChoice(Settings.from_environment().model_id if model is None else str(name)),
        Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed),
        policy,
        TemplateOptions(dict(template_args or {}), tuple(as_schema(tool) for tool in tools or ())),
    )
    if model is None:
        model, tokenizer = load_model_and_tokenizer(request.choice.model_id)
    loaded = _Loaded(model, tokenizer, request.choice.model_id)
    refuse_unknown(tokenizer, request.template or TemplateOptions())
    collector = Collector()
    if db is not None:
        _store(os.fspath(db), request, loaded, collector)
    else:
        handle = prepare(model, tokenizer, [collector])
        rest: Any = (request.messages, request.sampling, policy, [collector])
        trace_turn(handle, loaded.model_id, *rest, template=request.template)
    return _result(collector, request)


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    model_id: str


def _turns(
    prompt: str | None, messages: Sequence[Mapping[str, Any]] | None
) -> tuple[ChatMessage, ...]:
    if (prompt is None) == (messages is None):
        raise UsageError("Give exactly one of prompt and messages.")
    if messages is None:
        messages = [{"role": Role.USER, "content": prompt}]
    turns = tuple(chat_message(message) for message in messages)
    if not turns:
        raise UsageError("There are no messages. Give at least one, or a prompt.")
    return turns


def _store(db: str, request: ReplyRequest, loaded: _Loaded, collector: Collector) -> None:
    # Imported here: a trace that is not stored needs no SQLAlchemy.
    from oki_trace.generate import generate_reply
    from oki_trace.queueing import submit
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    with TraceWriter(db) as writer, TraceReader(db) as reader:
        reply = reader.message(submit(writer, request, claim=True)[1])
        generate_reply(writer, reader, reply, loaded, messages=request.messages, sinks=[collector])


def _result(collector: Collector, request: ReplyRequest) -> tuple[str, dict[str, Any]]:
    start, end = collector.started, collector.ended
    assert start is not None and end is not None
    head = TraceHead(
        model_id=start.model_id,
        prompt=start.prompt,
        generation=start.generation,
        capture=start.capture,
        messages=request.messages,
        output=end.output,
        status=end.status,
        reason=end.reason,
        checks=end.checks,
        parts=end.parts,
        template=request.template,
    )
    lenses = {lens.step_index: lens for lens in collector.lenses}
    steps = [replace(step, lens=lenses.get(step.step_index)) for step in collector.steps]
    return end.output, trace_object(head, steps)
