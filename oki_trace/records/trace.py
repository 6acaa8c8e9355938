"""The trace of a reply: its prompt, its settings, and each step with everything captured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oki_trace.records.request import LOGIT, CapturePolicy, Part, Status

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

Segment = Literal["template", "system", "user", "assistant", "thinking", "tool_call", "tool"]
Origin = Literal["sampled", "forced", "given"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input of the model: its text, and one token per position.

    ``segments`` has the origin of each token: a message of that role, the thinking or a
    tool call of an earlier reply, or the chat template around them.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """The effective sampling settings, including the model's generation config.

    ``others`` are settings of that config without a field here, in its own words
    ("min_p 0.05"). ``replaced`` names settings that do not choose one token per step, such
    as beam search: the reply was sampled, or greedy, instead.
    """

    do_sample: bool
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    eos_token_ids: tuple[int, ...]
    others: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """The data that could be captured from this model, how, and how accurately.

    ``lens_check`` is the largest |Δlogprob| between the lens at the last layer and the
    model's own logits, ``attention_check`` the largest |Δweight| between the captured
    attention and the model's eager attention; both from a short forward pass at load.
    None: not available, and ``lens_reason`` or ``evidence_provenance`` says why.

    ``lens_draft``: inner layers are drafted in bfloat16 and only their best tokens are
    computed in float32; the largest |Δprob| of this at load (at most 1e-3). None: no
    draft.

    ``cache_check`` is the largest |Δlogprob| that the KV cache causes: the last token
    decoded by itself against one pass over the same text. Decoding uses the cache, so
    teacher forcing differs from a reply by as much.

    ``speedups`` are the optional fast paths by name: None for one that was used, else the
    reason why not.

    ``tensors_left_out``: the full tensors of ``policy`` were captured, but the file from
    which this reply was imported does not have them.

    ``windows``: the length and stride of the windows in which a long text was scored.

    ``reused``: the tokens at the beginning of the prompt whose KV cache was that of the
    reply before; ``not_reused``: why there are none, although it began alike.
    """

    policy: CapturePolicy
    layers: int
    width: int
    dtype: str
    device: str
    quantization: str | None
    evidence_provenance: str
    attention_layers: tuple[int, ...]
    attention_check: float | None
    logit_lens_available: bool
    lens_reason: str | None
    lens_check: float | None
    versions: str
    lens_draft: float | None = None
    cache_check: float | None = None
    speedups: dict[str, str | None] = field(default_factory=dict)
    tensors_left_out: bool = False
    windows: tuple[int, int] | None = None
    reused: int = 0
    not_reused: str | None = None

    @property
    def fast_paths(self) -> str:
        """The ``speedups`` that are on, and why the others are off, in one line."""
        on = ", ".join(name for name, off in self.speedups.items() if off is None) or "none"
        off = [f"{name} off ({why})" for name, why in self.speedups.items() if why is not None]
        return "; ".join([f"fast paths: {on}", *off])


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The k most likely tokens of one distribution, rank 1 first; arrays of shape (k,).

    ``sampled_probs`` are the probabilities after temperature, top-k, top-p and penalties:
    0 for a token that they removed; None when decoding was plainly greedy. ``noise`` is
    that of the draw (see ``Decision``); None without a draw.
    """

    token_ids: IntArray
    tokens: tuple[str, ...]
    logits: FloatArray
    probs: FloatArray
    sampled_probs: FloatArray | None = None
    noise: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one sampling setting on the distribution.

    It removed ``removed`` tokens with the probability ``removed_mass`` in total;
    ``chosen_prob`` is the probability of the chosen token after it.
    """

    name: str
    setting: str
    removed: int
    removed_mass: float
    chosen_prob: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A token in the draw; ``prob`` is its final probability (0: it was removed)."""

    token_id: int
    token: str
    prob: float
    noise: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Why this token was chosen: the effects of the sampling settings, and the draw.

    ``effects`` are in the order of application; ``candidates`` tokens were left. A draw
    adds noise to every token (Gumbel, independent of its probability) and chooses the
    token with the largest log prob + noise: the Gumbel-max form of
    ``torch.multinomial``, whose race of exponentials q has noise = -log q. ``noise`` is
    that of the chosen token; None where nothing was drawn, or where the device does not
    expose its draw. ``greedy`` is the token that greedy decoding would have chosen,
    ``runner_up`` the second in the draw.
    """

    drawn: bool
    effects: tuple[Effect, ...]
    candidates: int
    noise: float | None
    greedy: Contender
    runner_up: Contender | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """The attention of one layer from the newest position, averaged over heads.

    ``positions`` and ``weights`` (k,), the most attended first. ``missing`` is 1 minus
    the sum of the whole row: the share of a learned sink, where the model has one.
    """

    layer: int
    positions: IntArray
    weights: FloatArray
    missing: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """The reading of one step by one lens: a next-token distribution per layer.

    ``name`` is LOGIT for the Logit Lens (nostalgebraist, 2020), else that of an installed
    lens. ``layers`` (n,) are the layers that it can read, in ascending order; None: all,
    0 to L. The last one is always L, the model's own distribution.

    ``step_index`` is that of its step. ``token_ids``, ``logits``, ``probs``: (n, k), rank 1
    first; ``tokens`` likewise. ``entropy``, ``chosen_rank``, ``chosen_prob``, ``kl``: (n,),
    ``kl`` being KL(model's own distribution ‖ this layer's), in nats.
    """

    step_index: int
    token_ids: IntArray
    tokens: tuple[tuple[str, ...], ...]
    logits: FloatArray
    probs: FloatArray
    entropy: FloatArray
    chosen_rank: IntArray
    chosen_prob: FloatArray
    kl: FloatArray
    name: str = LOGIT
    layers: IntArray | None = None

    @property
    def layer_numbers(self) -> IntArray:
        """The layer of each row (n,)."""
        return np.arange(len(self.entropy)) if self.layers is None else self.layers

    @property
    def settle_layer(self) -> int | None:
        """The first layer from which the chosen token stays on top; None if it never does."""
        not_on_top = np.flatnonzero(self.chosen_rank != 1)
        first = int(not_on_top[-1]) + 1 if not_on_top.size else 0
        return int(self.layer_numbers[first]) if first < len(self.chosen_rank) else None


@dataclass(frozen=True, slots=True, eq=False)
class LayerRouting:
    """The experts that a layer's router chose for a token, in a mixture of experts.

    ``experts`` and ``weights`` (k,), the largest weight first: the weights with which the
    outputs of the experts are added up.
    """

    layer: int
    experts: IntArray
    weights: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """A full tensor of one step.

    ``logits`` (vocab,); ``hidden_states`` (L+1, width); ``attentions`` (layers with
    attention, heads, keys), where ``layers`` are the numbers of these layers and
    ``key_offset`` is the position of the first key. A layer with a shorter window or
    fewer heads is padded with zeros, so that column c is position ``key_offset + c`` in
    every layer. ``dtype`` is that of the model; an array in bfloat16, which NumPy lacks,
    has its bits in uint16.
    """

    name: Literal["logits", "hidden_states", "attentions"]
    array: NDArray[np.generic]
    dtype: str
    layers: tuple[int, ...] = ()
    key_offset: int = 0

    def to_float32(self) -> FloatArray:
        """The values as float32, exact for every ``dtype`` but float64."""
        if self.dtype == "bfloat16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(self.array, dtype=np.float32)


def surprisal_of(logprob: float) -> float:
    """-log prob, in nats; 0 where rounding made the logarithm of a certain token positive."""
    return 0.0 if logprob >= 0 else -logprob


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One position at which the model predicted the next token, and everything captured there.

    ``origin``: the sampler chose the token (``sampled``), a user did (``forced``), or it is
    part of the text that the model was given (``given``). ``step_index`` counts generated
    tokens from 0; it is -1 for given ones, which ``position`` identifies.

    ``margin`` is the probability of rank 1 minus that of rank 2. ``token_bytes`` are the
    bytes of the token, which may be a part of a UTF-8 character. ``sampled_prob`` is its
    probability after the sampling settings; it and ``decision`` are None when decoding
    was plainly greedy. ``lens`` is the Logit Lens, ``lenses`` the readings by installed lenses,
    in the order of their names. While a reply is running, they follow their step by a few
    steps. ``router`` has one entry per layer with experts.

    ``digest`` and ``tensor_digest`` are those of the step and its tensors when they were
    recorded (see ``store.digest``); None before that.
    """

    step_index: int
    position: int
    token_id: int
    token: str
    token_bytes: bytes
    is_special: bool
    logit: float
    prob: float
    logprob: float
    entropy: float
    rank: int
    margin: float
    sampled_prob: float | None
    elapsed_ms: float
    topk: Candidates
    attention: tuple[LayerAttention, ...] = ()
    lens: Lens | None = None
    decision: Decision | None = None
    origin: Origin = "sampled"
    tensors: tuple[TensorRecord, ...] = field(default=(), repr=False)
    digest: bytes | None = field(default=None, repr=False)
    tensor_digest: bytes | None = field(default=None, repr=False)
    lenses: tuple[Lens, ...] = ()
    router: tuple[LayerRouting, ...] = ()

    @property
    def surprisal(self) -> float:
        """-log prob of the chosen token, in nats; never below 0."""
        return surprisal_of(self.logprob)

    @property
    def differs_from_greedy(self) -> bool:
        """Whether another token was chosen than by greedy decoding."""
        return self.decision is not None and self.decision.greedy.token_id != self.token_id

    def with_lenses(self, lenses: Iterable[Lens]) -> Step:
        """This step with its readings, the Logit Lens and others."""
        by_name = {lens.name: lens for lens in lenses}
        own = by_name.pop(LOGIT, None)
        return replace(self, lens=own, lenses=tuple(by_name[name] for name in sorted(by_name)))

    @property
    def evidence(self) -> LayerAttention | None:
        """The attention of the last layer that has any."""
        return self.attention[-1] if self.attention else None


@dataclass(frozen=True, slots=True)
class TurnStart:
    """The facts about a reply that are known before its first token.

    The last ``prefix_len`` tokens of the prompt are the beginning of the reply, whose text
    is ``prefix_text``.
    """

    model_id: str
    prompt: Prompt
    generation: Generation
    capture: CaptureReport
    prefix_len: int = 0
    prefix_text: str = ""


@dataclass(frozen=True, slots=True)
class ReplyChecks:
    """How well a reply's own numbers agree with its model, measured at some of its ``steps``.

    ``lens`` is the largest |Δlogprob| between the lens at the last layer and the logits of
    the step; ``draft`` the largest |Δprob| between a drafted lens and the exact one;
    ``attention`` the largest difference between the sum of a head's weights and 1 (where
    the model has a learned sink, the excess over 1). None: nothing to check. ``fault``
    names a disagreement: nothing of that kind was stored from there on, and earlier
    values are unreliable. ``notes`` say which fast paths were given up to stay exact.
    """

    steps: tuple[int, ...]
    lens: float | None = None
    draft: float | None = None
    attention: float | None = None
    fault: str | None = None
    notes: tuple[str, ...] = ()

    def after(self, earlier: ReplyChecks) -> ReplyChecks:
        """These checks, joined with those of the prompt before the reply."""

        def largest(name: str) -> float | None:
            values = [getattr(one, name) for one in (self, earlier)]
            return max((value for value in values if value is not None), default=None)

        faults = [one.fault for one in (earlier, self) if one.fault is not None]
        return ReplyChecks(
            self.steps,
            **{name: largest(name) for name in ("lens", "draft", "attention")},
            fault="; ".join(faults) or None,
            notes=tuple(dict.fromkeys(earlier.notes + self.notes)),
        )


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a reply ended. ``reason``: why it stopped or what failed.

    ``output`` is the text of its answer, ``parts`` are all of it.
    """

    status: Status
    output: str
    reason: str
    seconds: float
    checks: ReplyChecks | None = None
    parts: tuple[Part, ...] = ()
