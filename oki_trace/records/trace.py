"""What is seen while a model answers: the prompt, each step, and all that belongs to one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oki_trace.records.request import CapturePolicy, Part, Status

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

Segment = Literal["template", "system", "user", "assistant", "thinking", "tool_call", "tool"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model was given: the text, and a token a position.

    ``segments`` says where each token comes from: a message of that role, the
    thinking or a tool call of an earlier reply, or the chat template around them.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """The sampling settings in force, the model's own generation config applied.

    ``others`` are settings of that config which have no field here, in its own
    words ("min_p 0.05"). ``replaced`` names what it asks for that is not one
    choice a step, such as beam search: the reply was sampled, or greedy, instead.
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
    """What could be captured of this model, how, and how far it was checked.

    ``lens_check`` is the largest |Δlogprob| between the lens at the last layer
    and the model's own logits, ``attention_check`` the largest |Δweight|
    between the captured attention and the model's eager attention; both from
    a short forward when the model was loaded. None: not available, and
    ``lens_reason`` or ``evidence_provenance`` says why.

    ``lens_draft``: inner layers are drafted in bfloat16 and only their best
    tokens computed in the model's own float32; the largest |Δprob| that this
    made when the model was loaded (at most 1e-3). None: nothing was drafted.

    ``cache_check`` is the largest |Δlogprob| that the model's own cache makes: its
    last token by itself against one pass over the same text. Decoding has the
    cache, so teacher forcing differs from a reply by as much.

    ``speedups`` are the optional fast paths by name: None where one was used, else why
    it was not.

    ``tensors_left_out``: the full tensors that ``policy`` names were captured, but
    the file that this reply was imported from does not hold them.
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

    @property
    def fast_paths(self) -> str:
        """Which of ``speedups`` are on, and why the others are off, in a line."""
        on = ", ".join(name for name, off in self.speedups.items() if off is None) or "none"
        off = [f"{name} off ({why})" for name, why in self.speedups.items() if why is not None]
        return "; ".join([f"fast paths: {on}", *off])


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The k most likely tokens of one distribution, rank 1 first; arrays of shape (k,).

    ``sampled_probs`` are the probabilities after temperature, top-k, top-p and
    penalties: 0 for a token they removed; None when decoding was plainly greedy.
    ``noise`` is what the draw gave each (see ``Decision``); None without a draw.
    """

    token_ids: IntArray
    tokens: tuple[str, ...]
    logits: FloatArray
    probs: FloatArray
    sampled_probs: FloatArray | None = None
    noise: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What one sampling setting did to the distribution it was given.

    ``removed`` tokens went, which had ``removed_mass`` of the probability just
    before; ``chosen_prob`` is the chosen token's probability just after.
    """

    name: str
    setting: str
    removed: int
    removed_mass: float
    chosen_prob: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A token in the draw: ``prob`` is of the final distribution (0: it was removed)."""

    token_id: int
    token: str
    prob: float
    noise: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """Why this token: what the settings made of the model's distribution, and the draw.

    ``effects`` in the order they were applied. ``candidates`` tokens were left.
    A draw gives every token noise (Gumbel, independent of its probability), and
    the token with the largest log prob + noise is chosen: the Gumbel-max form
    of ``torch.multinomial``, whose race of exponentials q has noise = -log q.
    ``noise`` is the chosen token's; None where nothing was drawn, or where the
    device does not show its draw. ``greedy`` is the token that would have been
    said without a draw, ``runner_up`` the one that came second in it.
    """

    drawn: bool
    effects: tuple[Effect, ...]
    candidates: int
    noise: float | None
    greedy: Contender
    runner_up: Contender | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """Where one layer looked from the newest position, heads averaged.

    ``positions`` and ``weights`` (k,), the most attended first. ``missing`` is
    what the kept weights of the whole row leave of 1: the share of a learned
    sink, where the model has one.
    """

    layer: int
    positions: IntArray
    weights: FloatArray
    missing: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """The Logit Lens of one step (nostalgebraist, 2020): a row a layer, 0 to L.

    ``token_ids``, ``logits``, ``probs``: (L+1, k), rank 1 first; ``tokens``
    likewise. ``entropy``, ``chosen_rank``, ``chosen_prob``, ``kl``: (L+1,),
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

    @property
    def settle_layer(self) -> int | None:
        """The first layer from which the chosen token stays on top; None if it never does."""
        behind = np.flatnonzero(self.chosen_rank != 1)
        first = int(behind[-1]) + 1 if behind.size else 0
        return first if first < len(self.chosen_rank) else None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A full tensor of one step.

    ``logits`` (vocab,); ``hidden_states`` (L+1, width); ``attentions``
    (layers with attention, heads, keys), where ``layers`` holds the true layer
    numbers and ``key_offset`` the position of the first key. A layer with a
    shorter window or fewer heads is padded with zeros, so that column c is
    position ``key_offset + c`` in every layer. ``dtype`` is the model's own;
    bfloat16, which NumPy lacks, is held as its bits in uint16.
    """

    name: Literal["logits", "hidden_states", "attentions"]
    array: NDArray[np.generic]
    dtype: str
    layers: tuple[int, ...] = ()
    key_offset: int = 0


def surprisal_of(logprob: float) -> float:
    """-log prob, in nats; 0 where rounding put the logarithm of a certain token above 0."""
    return 0.0 if logprob >= 0 else -logprob


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One generated token, and what was seen when it was chosen.

    ``margin`` is the probability of rank 1 less that of rank 2. ``token_bytes``
    are the token's own bytes, which may be half a UTF-8 character.
    ``sampled_prob`` is its probability after the sampling settings; it and
    ``decision`` are None when plainly greedy, with no setting applied. ``lens``
    trails its step by a few steps while a reply is running.

    ``digest`` and ``tensor_digest`` say what the step and its tensors were when
    they were recorded (``store.digest``); None while that has not been done.
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
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    digest: bytes | None = field(default=None, repr=False)
    tensor_digest: bytes | None = field(default=None, repr=False)

    @property
    def surprisal(self) -> float:
        """-log prob of the chosen token, in nats; never below 0."""
        return surprisal_of(self.logprob)

    @property
    def differs_from_greedy(self) -> bool:
        """Whether the draw chose another token than greedy decoding would have."""
        return self.decision is not None and self.decision.greedy.token_id != self.token_id

    @property
    def evidence(self) -> LayerAttention | None:
        """The attention of the final layer that has any."""
        return self.attention[-1] if self.attention else None


@dataclass(frozen=True, slots=True)
class TurnStart:
    """What is known of a reply before its first token."""

    model_id: str
    prompt: Prompt
    generation: Generation
    capture: CaptureReport


@dataclass(frozen=True, slots=True)
class ReplyChecks:
    """How far a reply's own numbers agree with its model, measured at some of its ``steps``.

    ``lens`` is the largest |Δlogprob| between the lens at the last layer and the
    logits of the step; ``draft`` the largest |Δprob| between the drafted lens of a
    step and the whole one; ``attention`` the largest difference between what a
    head's weights add up to and 1 (where the model has a learned sink, what is
    above 1). None: there was nothing to check. ``fault`` says what disagreed: from
    there on nothing of that kind was kept, and what was kept before is not to be
    relied on. ``notes`` say what was given up to stay exact.
    """

    steps: tuple[int, ...]
    lens: float | None = None
    draft: float | None = None
    attention: float | None = None
    fault: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a reply ended. ``reason``: which stop it was, or what failed.

    ``output`` is the text of its answer, ``parts`` all that it consists of.
    """

    status: Status
    output: str
    reason: str
    seconds: float
    checks: ReplyChecks | None = None
    parts: tuple[Part, ...] = ()
