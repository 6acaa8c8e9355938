"""``run_traced``: generates and traces a reply in one call, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from oki_trace.chat_messages import chat_message
from oki_trace.errors import UsageError
from oki_trace.exchange.trace_object import TraceHead, trace_object
from oki_trace.input_text import require_storable
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.teacher_forcing import Windows
from oki_trace.llm.chat.template_arguments import refuse_unknown
from oki_trace.llm.lenses.library import require_installed
from oki_trace.llm.loading.load import load_model_and_tokenizer
from oki_trace.queueing import ReplyRequest, history
from oki_trace.records import (
    CapturePolicy,
    ChatMessage,
    Forced,
    Lens,
    ModelChoice,
    PromptTrace,
    Role,
    Sampling,
    TemplateOptions,
    TensorMode,
)
from oki_trace.scoring import GivenText, of_messages, of_text, score_given, score_into_store
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
    trace_prompt: PromptTrace | Literal["none"] = "light",
    lens_layers: str | None = None,
    prefill: str | None = None,
    branch_of: int | None = None,
    branch_step: int | None = None,
    token: str | None = None,
    token_id: int | None = None,
    rank: int | None = None,
    lenses: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Generate a reply; return its text and its trace object.

    Exactly one of ``prompt`` (one user message) and ``messages``
    (``[{"role": …, "content": …}]``) is given. Messages may have ``reasoning_content``,
    ``tool_calls`` and the role ``tool``, as ``apply_chat_template`` takes them; if the
    last one is the assistant's, the reply continues it. Without ``model`` and
    ``tokenizer`` the default model is loaded. ``db``, a path or SQLAlchemy URL, also
    stores the conversation there, and ``tensors`` says how its full tensors are stored.
    ``template_args`` (such as ``enable_thinking``) and ``tools``, JSON schemas of
    functions, go to the chat template. ``trace_prompt`` ("light", "full" or "none") says how the
    prompt's tokens are traced, in ``prompt_steps`` of the trace, and ``lens_layers`` at which
    layers the Logit Lens reads them: "all", "none", "every:4" or "0,8,16-29"; by default all,
    but none of a long prompt. ``prefill`` is the beginning of the reply. ``lenses`` are the names
    of installed lenses that read every step besides the Logit Lens, in ``lenses`` of each step.
    Raises UsageError for invalid arguments, ModelError when the model cannot be loaded or traced.

    ``branch_of``, in place of a prompt, is a reply in ``db`` by its message's number: the new
    reply keeps its tokens before ``branch_step`` (0 regenerates it; by default it goes on
    after the last token), and goes on with ``token``, a text, with ``token_id``, with the
    stored candidate of this ``rank``, or with a new choice of the model.
    """
    kept = "none" if db is None else tensors
    level = None if trace_prompt == "none" else trace_prompt
    counts, names = (topk_logits, topk_evidence, topk_lens), require_installed(lenses)
    policy = CapturePolicy(*counts, kept, level, lens_layers=lens_layers, lenses=names)
    name = _name_of(model, tokenizer)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    forks = (branch_step, token, token_id, rank)
    if branch_of is not None:
        if db is None or (prompt, messages, prefill) != (None, None, None):
            raise UsageError("branch_of names a reply in db. Give db, and no prompt or messages.")
        loaded = _load(model, tokenizer, name)
        return _branch(os.fspath(db), loaded, branch_of, *forks, sampling, policy)
    if any(value is not None for value in forks):
        raise UsageError("branch_step, token, token_id and rank belong to branch_of. Give it too.")
    request = ReplyRequest(
        _turns(prompt, messages),
        ModelChoice(name),
        sampling,
        policy,
        TemplateOptions(dict(template_args or {}), tuple(as_schema(tool) for tool in tools or ())),
        None if prefill is None else Forced(text=prefill),
    )
    loaded = _load(model, tokenizer, name)
    refuse_unknown(loaded.tokenizer, request.template or TemplateOptions())
    collector = Collector()
    if db is not None:
        _store(os.fspath(db), request, loaded, collector)
    else:
        handle = prepare(loaded.model, loaded.tokenizer, [collector])
        rest: Any = (request.messages, request.sampling, policy, [collector])
        options: Any = {"template": request.template, "forced": request.forced}
        trace_turn(handle, loaded.model_id, *rest, **options)
    return _result(collector, request)


def score_traced(
    text: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    topk_logits: int = 10,
    topk_evidence: int = 10,
    topk_lens: int = 5,
    *,
    window: int | None = None,
    stride: int | None = None,
    lens_layers: str | None = None,
    db: str | os.PathLike[str] | None = None,
    tensors: TensorMode = "none",
    lenses: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a given text without generating; return its trace object.

    Exactly one of ``text``, as it is, and ``messages``, in the model's chat template, is
    given. Every token but the first is a step in ``prompt_steps``: its logprob in nats, its
    rank, the distribution, attention and Logit Lens from the position before it. A text
    longer than the model's context needs a ``window`` of so many tokens, each ``stride``
    tokens after the one before (half a window by default). The other arguments are those of
    ``run_traced``. Raises UsageError for invalid arguments, ModelError when the model cannot
    be loaded or traced, CaptureError for a text that cannot be scored.
    """
    if (text is None) == (messages is None):
        raise UsageError("Give exactly one of text and messages.")
    turns = _turns(text, messages)
    for turn in turns:
        require_storable(turn.content, "The text")
    windows = Windows.of(window, stride)
    counts, names = (topk_logits, topk_evidence, topk_lens), require_installed(lenses)
    policy = CapturePolicy(*counts, tensors, "full", lens_layers=lens_layers, lenses=names)
    if db is None:
        policy = replace(policy, tensors="none")
    loaded = _load(model, tokenizer, _name_of(model, tokenizer))

    def given(instrument: Instrument) -> GivenText:
        own = instrument.tokenizer, instrument.vocabulary
        return of_text(*own, turns[0].content) if text is not None else of_messages(*own, turns)

    collector = Collector()
    if db is not None:
        from oki_trace.store.writing.writer import TraceWriter

        choice = ModelChoice(loaded.model_id)
        with TraceWriter(os.fspath(db)) as writer:
            score_into_store(
                writer, loaded, choice, policy, given, sinks=[collector], windows=windows
            )
    else:
        handle = prepare(loaded.model, loaded.tokenizer, ())
        score_given(handle, loaded.model_id, given(handle), policy, [collector], windows=windows)
    return _result(collector, ReplyRequest(turns, ModelChoice(loaded.model_id)))[1]


def _name_of(model: Any, tokenizer: Any) -> str:
    """The name that the trace gives the model; the default model's if none is given."""
    if (model is None) != (tokenizer is None):
        raise UsageError("Give both model and tokenizer, or neither.")
    if model is None:
        return Settings.from_environment().model_id
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def _load(model: Any, tokenizer: Any, name: str) -> _Loaded:
    if model is None:
        model, tokenizer = load_model_and_tokenizer(name)
    return _Loaded(model, tokenizer, name)


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


def _branch(
    db: str,
    loaded: _Loaded,
    message_id: int,
    step: int | None,
    token: str | None,
    token_id: int | None,
    rank: int | None,
    sampling: Sampling,
    policy: CapturePolicy,
) -> tuple[str, dict[str, Any]]:
    """Generate a reply that departs from a stored one."""
    from oki_trace.generate import generate_reply
    from oki_trace.queueing import fork_candidates, submit_branch
    from oki_trace.store.reading.reader import TraceReader
    from oki_trace.store.writing.writer import TraceWriter

    if sum(value is not None for value in (token, token_id, rank)) > 1:
        raise UsageError("Give one of token, token_id and rank.")
    collector = Collector()
    with TraceWriter(db) as writer, TraceReader(db) as reader:
        origin = reader.message(message_id)
        at = origin.tokens if step is None else step
        forced = None if token is None else Forced(text=token)
        if rank is not None:
            (candidate,) = fork_candidates(reader, origin, at, range(rank, rank + 1))
            token_id = candidate.token_id
        if token_id is not None:
            forced = Forced((token_id,))
        reply_id = submit_branch(writer, origin, at, sampling, policy, forced=forced, claim=True)
        reply = reader.message(reply_id)
        generate_reply(writer, reader, reply, loaded, sinks=[collector])
        turns = history(reader.messages(reply.conversation_id), reply_id)
    choice = origin.choice or ModelChoice(loaded.model_id)
    return _result(collector, ReplyRequest(turns, choice, template=origin.template))


def _result(collector: Collector, request: ReplyRequest) -> tuple[str, dict[str, Any]]:
    start, end = collector.started, collector.ended
    assert start is not None and end is not None
    head = TraceHead(start, end, request.messages, request.template)
    lenses: dict[int, list[Lens]] = {step.step_index: [] for step in collector.steps}
    for lens in collector.lenses:
        lenses[lens.step_index].append(lens)
    steps = [step.with_lenses(lenses[step.step_index]) for step in collector.steps]
    return end.output, trace_object(head, steps, collector.prompt_steps)
