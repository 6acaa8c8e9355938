"""Every field that an export has, by name, with its type and its limits.

All formats are read through these types: what one refuses every one refuses, in
the same sentence. A field that may be missing may be null as well; a name that
is not listed here is skipped. ``reading`` makes records of what has passed, and
checks what concerns several fields together.

To add a field: name it here, write it in ``trace_object`` or ``json_export``
and in ``tables``, and read it in ``reading`` or ``staging``. A test holds that
what is written is also read.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Annotated, Any, Required, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import TypedDict

from oki_trace.errors import UsageError
from oki_trace.exchange.refusal import invalid
from oki_trace.records import (
    CapturePolicy,
    ModelChoice,
    PartKind,
    Role,
    Sampling,
    Segment,
    Status,
    TensorMode,
    is_too_deep,
)

# Limits; docs/formats.md states them.
MAX_PROMPT = 2_000_000
MAX_STEPS = 250_000
MAX_MESSAGES = 10_000
MAX_ENTRIES = 1_000
MAX_LAYERS = 1_000
MAX_CELLS = 200_000
MAX_TEXT = 16_000_000
MAX_TOKEN = 10_000
MAX_SPEEDUPS = 20
YEARS = (1971, 2199)

_INT32 = 2**31 - 1
_FLOAT32 = 3.4028234e38

_T = TypeVar("_T")
_strict = with_config(ConfigDict(strict=True, extra="ignore"))


def _measured(value: float) -> float:
    """An infinity is a number too: that of a token which the model rules out."""
    if _FLOAT32 < abs(value) < float("inf"):
        raise PydanticCustomError("too_large", "is too large a number")
    # Not every store tells -0 from 0.
    return value + 0.0


def _moment(value: Any) -> Any:
    """ISO 8601, or a time; without a time zone it is UTC."""
    if isinstance(value, str) and len(value) <= 64:
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise PydanticCustomError("time", "is no time") from None
    if not isinstance(value, dt.datetime):
        raise PydanticCustomError("time", "is no time")
    if not YEARS[0] <= value.year <= YEARS[1]:
        raise PydanticCustomError("time", f"is not within the years {YEARS[0]} to {YEARS[1]}")
    return (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)


def _bytes(value: Any) -> Any:
    """Hexadecimal in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise PydanticCustomError("hex", "are no hexadecimal bytes") from None


def _shallow(value: Any) -> Any:
    """Any JSON that programs can go along with."""
    if is_too_deep(value):
        raise PydanticCustomError("deep", "is nested too deeply")
    return value


Link = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, le=_INT32)]
Large = Annotated[int, Field(ge=0, lt=2**53)]
Rank = Annotated[int, Field(ge=1, le=_INT32)]
Layer = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
Position = Annotated[int, Field(ge=0, le=MAX_PROMPT + MAX_STEPS)]
Token = Annotated[str, Field(max_length=MAX_TOKEN)]
TokenBytes = Annotated[bytes, Field(max_length=4 * MAX_TOKEN), BeforeValidator(_bytes)]
StepDigest = Annotated[bytes, Field(min_length=16, max_length=16), BeforeValidator(_bytes)]
MessageDigest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Label = Annotated[str, Field(max_length=10_000)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Time = Annotated[dt.datetime, BeforeValidator(_moment)]
Number = Annotated[float, AfterValidator(_measured)]
# As far above 1, or below 0, as rounding over a large vocabulary can lead.
Prob = Annotated[float, Field(ge=0, le=1.001)]
Share = Annotated[float, Field(ge=-0.01, le=1.01)]
LogProb = Annotated[float, Field(le=0.001), AfterValidator(_measured)]
Nats = Annotated[float, Field(ge=-0.1), AfterValidator(_measured)]
Positive = Annotated[float, Field(ge=0), AfterValidator(_measured)]
Duration = Annotated[float, Field(ge=0, le=1e12)]


@dataclass(frozen=True)
class _UpTo:
    """So many entries of a list. The first that is wrong ends it: it may have many."""

    most: int

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        made = handler(source)
        assert made["type"] == "list"
        return {**made, "max_length": self.most, "fail_fast": True}


_ENTRIES = _UpTo(MAX_ENTRIES)
_OF_LAYERS = _UpTo(MAX_LAYERS + 1)
_OF_PROMPT = _UpTo(MAX_PROMPT)


# ------------------------------------------------------------------ a conversation


@_strict
class Document(TypedDict, total=False):
    """What any file says of itself."""

    format: Label | None
    version: Count | None
    layout: Label | None


@_strict
class Conversation(TypedDict, total=False):
    """A conversation without its messages."""

    id: Link | None
    title: Annotated[str, Field(max_length=100_000)] | None
    created_at: Time | None


@_strict
class _Choice(TypedDict, total=False):
    model_id: Required[Label]
    use_4bit: bool | None
    dtype: Label | None
    device: Label | None


@_strict
class _Sampling(TypedDict, total=False):
    max_new_tokens: Large | None
    temperature: Positive | None
    top_p: Positive | None
    top_k: Large | None
    repetition_penalty: Positive | None
    seed: Link | None


@_strict
class _Policy(TypedDict, total=False):
    topk_logits: Count | None
    topk_evidence: Count | None
    topk_lens: Count | None
    tensors: Required[TensorMode]


@dataclass(frozen=True)
class _Made:
    """A record, made of these fields. One that is missing takes the record's own default."""

    fields: type[Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def make(values: dict[str, Any]) -> Any:
            given = {name: value for name, value in values.items() if value is not None}
            try:
                return source(**given)
            except UsageError as error:
                why = {"why": str(error).rstrip(".")}
                raise PydanticCustomError("record", "cannot be: {why}", why) from None

        fields = handler.generate_schema(self.fields)
        return core_schema.no_info_after_validator_function(make, fields)


Choice = Annotated[ModelChoice, _Made(_Choice)]
Asked = Annotated[Sampling, _Made(_Sampling)]
Policy = Annotated[CapturePolicy, _Made(_Policy)]


@_strict
class Checks(TypedDict, total=False):
    """How far a reply's numbers agree with its model; see ``records.ReplyChecks``."""

    steps: Annotated[list[Count], _UpTo(MAX_CELLS)] | None
    lens: Positive | None
    draft: Positive | None
    attention: Positive | None
    fault: Label | None
    notes: Annotated[list[Label], _ENTRIES] | None


@_strict
class Part(TypedDict, total=False):
    """A part of a reply; see ``records.Part``."""

    kind: Required[PartKind]
    text: Required[Text]
    start: Count | None
    end: Count | None
    name: Label | None
    arguments: Annotated[Any, AfterValidator(_shallow)]


@_strict
class Template(TypedDict, total=False):
    """What a chat template was given beside the messages; see ``records.TemplateOptions``."""

    arguments: Annotated[dict[str, Any], AfterValidator(_shallow)] | None
    tools: Annotated[list[Any], _ENTRIES, AfterValidator(_shallow)] | None


Parts = Annotated[list[Part], _ENTRIES]


@_strict
class Message(TypedDict, total=False):
    """A message without its trace. All after ``created_at`` is of replies alone."""

    id: Link | None
    role: Required[Annotated[Role, Field(strict=False)]]
    content: Required[Text]
    status: Annotated[Status, Field(strict=False)] | None
    created_at: Time | None
    reason: Annotated[str, Field(max_length=100_000)] | None
    choice: Choice | None
    sampling: Asked | None
    policy: Policy | None
    seconds: Duration | None
    tokens: Count | None
    tensors_pruned_at: Time | None
    checks: Checks | None
    parts: Parts | None
    template: Template | None
    tool_name: Label | None
    digest: MessageDigest | None


# ------------------------------------------------------------------------- a reply


@_strict
class Generation(TypedDict, total=False):
    """The sampling settings in force; see ``records.Generation``."""

    do_sample: bool | None
    max_new_tokens: Large | None
    temperature: Positive | None
    top_p: Positive | None
    top_k: Large | None
    repetition_penalty: Positive | None
    seed: Link | None
    eos_token_ids: Annotated[list[Count], _ENTRIES] | None
    others: Annotated[list[Label], _ENTRIES] | None
    replaced: Annotated[list[Label], _ENTRIES] | None


@_strict
class Capture(TypedDict, total=False):
    """What was captured, and how far it was checked; see ``records.CaptureReport``."""

    policy: Policy | None
    layers: Required[Layer]
    width: Count | None
    dtype: Label | None
    device: Label | None
    quantization: Label | None
    evidence_provenance: Label | None
    attention_layers: Annotated[list[Layer], _OF_LAYERS] | None
    attention_check: Positive | None
    logit_lens_available: bool | None
    lens_reason: Label | None
    lens_check: Positive | None
    lens_draft: Positive | None
    versions: Label | None
    cache_check: Positive | None
    speedups: Annotated[dict[Label, Label | None], Field(max_length=MAX_SPEEDUPS)] | None
    tensors_left_out: bool | None


@_strict
class Said(TypedDict, total=False):
    """A message as a trace repeats it."""

    role: Required[Annotated[Role, Field(strict=False)]]
    content: Required[Text]
    parts: Parts | None
    tool_name: Label | None


@_strict
class Trace(TypedDict, total=False):
    """A trace without its ``steps``. Only version 1 has no ``capture``."""

    format: Label | None
    version: Count | None
    model_id: Label | None
    prompt: Text | None
    prompt_len: Annotated[int, Field(ge=0, le=MAX_PROMPT)] | None
    prompt_token_ids: Annotated[list[Count | None], _OF_PROMPT] | None
    prompt_tokens: Annotated[list[Token], _OF_PROMPT] | None
    prompt_segments: Annotated[list[Segment], _OF_PROMPT] | None
    output: Text | None
    messages: Annotated[list[Said], _UpTo(MAX_MESSAGES)] | None
    status: Annotated[Status, Field(strict=False)] | None
    reason: Annotated[str, Field(max_length=100_000)] | None
    evidence_provenance: Label | None
    logit_lens_available: bool | None
    generation: Generation | None
    capture: Capture | None
    checks: Checks | None
    parts: Parts | None
    template: Template | None


# -------------------------------------------------------------------------- a step


@_strict
class LensToken(TypedDict, total=False):
    """A token that the lens reads at a layer."""

    rank: Rank | None
    token_id: Count | None
    token: Required[Token]
    logit: Number | None
    prob: Prob | None


@_strict
class Candidate(LensToken, total=False):
    """A candidate for the next token."""

    sampled_prob: Prob | None
    noise: Number | None


@_strict
class Attended(TypedDict, total=False):
    """A position that a layer looked at."""

    rank: Rank | None
    position: Required[Position]
    weight: Prob | None


@_strict
class Evidence(Attended, total=False):
    """The same of the final layer, with what version 1 says of it."""

    token: Token | None
    relative: Annotated[int, Field(ge=-MAX_PROMPT, le=MAX_STEPS)] | None


@_strict
class AttentionLayer(TypedDict, total=False):
    """Where one layer looked, the most attended position first."""

    layer: Required[Layer]
    topk: Annotated[list[Attended], _ENTRIES] | None
    missing: Share | None


@_strict
class LensLayer(TypedDict, total=False):
    """What the lens reads at one layer, the most likely token first."""

    layer: Required[Layer]
    topk: Annotated[list[LensToken], _ENTRIES] | None
    chosen_rank: Rank | None
    chosen_prob: Prob | None
    entropy: Nats | None
    kl: Nats | None


@_strict
class Contender(TypedDict, total=False):
    """A token in the draw."""

    token_id: Count | None
    token: Required[Token]
    sampled_prob: Prob | None
    noise: Number | None


@_strict
class Effect(TypedDict, total=False):
    """What one sampling setting did."""

    name: Required[Label]
    setting: Required[Label]
    removed: Required[Large]
    removed_mass: Share | None
    chosen_prob: Prob | None


@_strict
class Decision(TypedDict, total=False):
    """Why this token; see ``records.Decision``."""

    drawn: Required[bool]
    candidates: Required[Count]
    noise: Number | None
    greedy: Required[Contender]
    runner_up: Contender | None
    processors: Annotated[list[Effect], _ENTRIES] | None


@_strict
class Step(TypedDict, total=False):
    """A step of a trace; see ``records.Step``."""

    step: Count | None
    chosen_token: Required[Token]
    chosen_id: Count | None
    chosen_bytes: TokenBytes | None
    is_special: bool | None
    position: Count | None
    logit: Number | None
    prob: Prob | None
    logprob: LogProb | None
    entropy: Nats | None
    rank: Rank | None
    margin: Share | None
    sampled_prob: Prob | None
    elapsed_ms: Duration | None
    decision: Decision | None
    logits_topk: Annotated[list[Candidate], _ENTRIES] | None
    evidence: Annotated[list[Evidence], _ENTRIES] | None
    attention: Annotated[list[AttentionLayer], _OF_LAYERS] | None
    logit_lens: Annotated[list[LensLayer], _OF_LAYERS] | None
    digest: StepDigest | None
    tensor_digest: StepDigest | None


@_strict
class Line(TypedDict, total=False):
    """Of a line of ``jsonl``: the reply that its step belongs to."""

    message: Required[Link]


# What cannot be told from a text is not validated a second time.
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def read(kind: type[_T], value: Any, where: str) -> _T:
    """``value`` as a ``kind`` of this module. Raises ExchangeError, which says ``where``."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    try:
        checked: _T = _ADAPTERS[kind].validate_python(value)
    except ValidationError as error:
        raise invalid(where, error) from error
    return checked


def known(values: Any, name: str, otherwise: Any) -> Any:
    """The value of a field; ``otherwise`` where it is missing or null."""
    value = values.get(name)
    return otherwise if value is None else value
