"""One model type, traced and compared with the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.attention import HookedTap, KernelTap, OutputAttentionsTap
from oki_trace.llm.capture.instrument import Instrument, instrument
from oki_trace.llm.chat.prompt import render
from oki_trace.records import CapturePolicy, ChatMessage, Role, Sampling, Step
from oki_trace.tracing import Collector, Sink, trace_turn
from tests import tiny
from tests.families import configs, truth

MESSAGES = [ChatMessage(Role.USER, "the quick brown fox jumps")]
TOKENS = 5
SEED = 7
SAME = 1e-3
NO_WEIGHTS = "the model returns no attention weights"
POLICY = CapturePolicy(
    topk_logits=configs.VOCABULARY,
    topk_evidence=100,
    topk_lens=configs.VOCABULARY,
    tensors="exact",
)
WAYS = {KernelTap: "kernel", HookedTap: "hooks", OutputAttentionsTap: "output_attentions"}


@dataclass
class Outcome:
    """The findings for one model type; errors are the largest ones, None if not applicable.

    ``lens_error`` in log-probability, over every layer, step and token;
    ``attention_error`` in weight, over every layer, head, step and key.
    ``reason`` says why a type is not traced, or not compared.
    """

    model_type: str
    reason: str | None = None
    layers: int = 0
    lens_error: float | None = None
    lens_reason: str | None = None
    attention: str | None = None
    attention_layers: tuple[int, ...] = ()
    attention_error: float | None = None
    attention_reason: str | None = None
    greedy: bool = False
    sampled: bool = False
    cache_differs: bool = False
    graph: bool = False

    @property
    def is_whole(self) -> bool:
        """The lens, the attention where the model has any, and the tokens are the model's own."""
        return (
            self.reason is None
            and self.lens_error is not None
            and (self.attention is not None or self.attention_reason == NO_WEIGHTS)
            and self.greedy
            and self.sampled
        )


def examine(model_type: str, *sinks: Sink) -> Outcome:
    """Build it, trace a greedy and a sampled turn, and compare; ``sinks`` get the greedy one."""
    found = Outcome(model_type, configs.NOT_BUILT.get(model_type))
    if found.reason is not None:
        return found
    return hold(configs.build(model_type), found, sinks)


def hold(
    model: Any,
    found: Outcome,
    sinks: Sequence[Sink] = (),
    *,
    twin: Any = None,
    in_steps: bool = False,
) -> Outcome:
    """Trace ``model`` and complete ``found``; ``twin`` is the same model with eager attention.

    ``in_steps``: a pass over many tokens is known to differ from steps of one.
    """
    made = instrument(model, tiny.tokenizer())
    found.layers = made.structure.layers
    found.graph = made.fast.step_graph is not None
    prompt = list(render(made.tokenizer, MESSAGES).token_ids)
    try:
        own = truth.generated(model, prompt, TOKENS, do_sample=False)
    except Exception as error:
        found.reason = f"generate() itself fails: {type(error).__name__}: {error}"
        with pytest.raises(CaptureError, match=type(error).__name__):
            _turn(made, Sampling(TOKENS), *sinks)
        return found
    greedy = _turn(made, Sampling(TOKENS), *sinks)
    sampled = _turn(made, Sampling(TOKENS, temperature=1.3, top_k=30, seed=SEED))
    found.greedy = _ids(greedy) == own.tokens
    torch.manual_seed(SEED)
    drawn = truth.generated(model, prompt, TOKENS, do_sample=True, temperature=1.3, top_k=30)
    found.sampled = _ids(sampled) == drawn.tokens
    if not in_steps and (truth.looks_ahead(model) or truth.adds_tokens(model)):
        found.reason = "does not decode left to right"
        return found
    ids = prompt + _ids(greedy)[:-1]
    whole = truth.logits(model, ids)[-TOKENS:]
    gap = max(float((a - b).abs().max()) for a, b in zip(whole, own.logits, strict=True))
    found.cache_differs = in_steps or gap > SAME
    _compare_lens(found, made, greedy, own, ids)
    _compare_attention(found, made, greedy, ids, twin or truth.eager_twin)
    return found


def _turn(made: Instrument, sampling: Sampling, *sinks: Sink) -> Collector:
    kept = Collector()
    trace_turn(made, "tiny", MESSAGES, sampling, POLICY, [kept, *sinks])
    return kept


def _ids(turn: Collector) -> list[int]:
    return [step.token_id for step in turn.steps]


def _tensor(step: Step, name: str) -> Any:
    return next((t for t in step.tensors if t.name == name), None)


def _compare_lens(
    found: Outcome, made: Instrument, turn: Collector, own: truth.Generated, ids: list[int]
) -> None:
    """Every layer of every step, all tokens, against the model's own code after the blocks."""
    if made.lens.projection is None:
        found.lens_reason = made.lens.reason
        return
    model, blocks = made.model, made.structure.blocks
    streams = truth.block_outputs(model, blocks, ids)[:-1]
    if found.cache_differs:
        # One pass gives other hidden states than decoding did: those of the trace stand in.
        for step in turn.steps:
            for layer, stream in enumerate(streams):
                row = _tensor(step, "hidden_states").array[layer]
                stream[0, step.position - 1] = torch.from_numpy(row)
    inner = [truth.logits_had_it_ended_with(model, blocks[-1], ids, s) for s in streams]
    worst = 0.0
    for step, lens, last in zip(turn.steps, turn.lenses, own.logits, strict=True):
        for layer, logits in enumerate([*(rows[step.position - 1] for rows in inner), last]):
            ranked = torch.from_numpy(lens.token_ids[layer])
            traced = torch.from_numpy(lens.logits[layer]).log_softmax(-1)
            difference = traced - logits.log_softmax(-1)[ranked]
            worst = max(worst, float(difference[torch.isfinite(logits[ranked])].abs().max()))
    found.lens_error = worst


def _compare_attention(
    found: Outcome, made: Instrument, turn: Collector, ids: list[int], twin: Any
) -> None:
    """Every head of every layer of every step against the model's own eager weights."""
    if not made.attention.layers:
        found.attention_reason = made.attention.provenance.removeprefix("not available: ")
        return
    found.attention = WAYS[type(made.hooks._tap)]
    found.attention_layers = made.attention.layers
    _assert_true_numbers(made)
    twin = twin(made.model) if twin is truth.eager_twin else twin
    if found.cache_differs:
        prompt = ids[: turn.steps[0].position]
        settings = {"do_sample": False, "output_attentions": True}
        expected = truth.generated(twin, prompt, TOKENS, **settings).attention
    else:
        eager = truth.eager_attention(twin, ids)
        places = [step.position - 1 for step in turn.steps]
        expected = [[w[:, at, : at + 1] for w in eager] for at in places]
    worst = 0.0
    for step, layers in zip(turn.steps, expected, strict=True):
        record = _tensor(step, "attentions")
        assert record.layers == made.attention.layers
        # Head by head: a layer that attends twice has the heads of both.
        heads = [row for rows in record.array for row in rows]
        for row, own in zip(heads, (head for rows in layers for head in rows), strict=True):
            mine = torch.zeros_like(own)
            mine[record.key_offset :] = torch.from_numpy(row)
            worst = max(worst, float((mine - own).abs().max()))
    found.attention_error = worst


ATTEND = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
DO_NOT = {"linear_attention", "conv", "moe", "mlp", "recurrent"}


def _assert_true_numbers(made: Instrument) -> None:
    """Attention is of the layers that the config says attend, where it says so."""
    kinds = getattr(made.model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if len(kinds) == made.structure.layers and set(kinds) <= ATTEND | DO_NOT:
        said = tuple(layer for layer, kind in enumerate(kinds, 1) if kind in ATTEND)
        assert made.attention.layers == said
