"""Validates imports: every field that an import may contain, with its type and its limits.

All formats are validated with these types, so a value that one format refuses is
refused by every format, with the same sentence. An optional field may be null, and
a field that is not declared here is ignored. The other modules of this package turn
the validated fields into records, and check the rules that involve several fields.

To add a field, declare it here, write it in ``trace_object`` or ``json_export``
and in ``tables``, and read it in this package. A test checks that every field
that is written is also read.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Required, TypeVar, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import TypedDict

from oki_trace import records
from oki_trace.errors import UsageError
from oki_trace.exchange.refusal import invalid
from oki_trace.records import Origin, PartKind, Role, Segment, Status, is_too_deep

# Limits; docs/formats.md states them.
MAX_PROMPT = 2_000_000
MAX_STEPS = 250_000
MAX_MESSAGES = 10_000
MAX_ENTRIES = 1_000
MAX_LAYERS = 1_000
MAX_CELLS = 200_000
MAX_LENSES = 16
MAX_TEXT = 16_000_000
MAX_TOKEN = 10_000
MAX_SPEEDUPS = 20
YEARS = (1971, 2199)

_INT32 = 2**31 - 1
_FLOAT32 = 3.4028234e38
_NAN = float("nan")

_T = TypeVar("_T")


def _positive_zero(value: float) -> float:
    """0 for -0, which not every store can represent."""
    return value + 0.0


def _float32(value: float) -> float:
    """In the range of 32-bit floats, or infinite: the logit of a token that is ruled out."""
    if _FLOAT32 < abs(value) < float("inf"):
        raise PydanticCustomError("too_large", "is too large a number")
    return _positive_zero(value)


def _time(value: Any) -> dt.datetime:
    """A datetime, or one in ISO 8601; without a time zone it is UTC."""
    if isinstance(value, str) and len(value) <= 64:
        try:
            value = dt.datetime.fromisoformat(value)
        except ValueError:
            raise PydanticCustomError("time", "is not a time") from None
    if not isinstance(value, dt.datetime):
        raise PydanticCustomError("time", "is not a time")
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
        raise PydanticCustomError("hex", "is not hexadecimal") from None


def _lens_name(value: str) -> str:
    """The name of an installed lens."""
    try:
        records.require_lens_name(value)
    except UsageError:
        raise PydanticCustomError("lens", "is not the name of an installed lens") from None
    return value


def _shallow(value: Any) -> Any:
    """Any JSON that is not nested too deeply for the programs that read it."""
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
LensName = Annotated[str, AfterValidator(_lens_name)]
Label = Annotated[str, Field(max_length=10_000)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Time = Annotated[dt.datetime, BeforeValidator(_time)]
Number = Annotated[float, AfterValidator(_float32)]
# Rounding over a large vocabulary can lead this far above 1 or below 0. ``EntryProb`` is of
# the long lists, whose -0 is removed from all entries at once.
EntryProb = Annotated[float, Field(ge=0, le=1.001)]
Prob = Annotated[EntryProb, AfterValidator(_positive_zero)]
Share = Annotated[float, Field(ge=-0.01, le=1.01), AfterValidator(_positive_zero)]
LogProb = Annotated[float, Field(le=0.001), AfterValidator(_float32)]
Nats = Annotated[float, Field(ge=-0.1), AfterValidator(_float32)]
Positive = Annotated[float, Field(ge=0), AfterValidator(_float32)]
Duration = Annotated[float, Field(ge=0, le=1e12), AfterValidator(_positive_zero)]


def _up_to(most: int) -> Any:
    """A list of at most ``most`` entries, validated up to the first that is wrong."""
    return Field(max_length=most, fail_fast=True)


_ENTRIES = _up_to(MAX_ENTRIES)
_OF_LAYERS = _up_to(MAX_LAYERS + 1)
_OF_PROMPT = _up_to(MAX_PROMPT)
_FORCED = Annotated[list[Count], _up_to(MAX_CELLS)]
_LIMITS: dict[Any, Any] = {
    int: Large,
    float: Positive,
    str: Label,
    tuple[int, ...]: Annotated[list[Count], _ENTRIES],
    tuple[str, ...]: Annotated[list[Label], _ENTRIES],
}


def _limit(kind: Any) -> Any:
    """The type of a record's field, or of a nullable one, with its usual limits."""
    kinds = [one for one in get_args(kind) if one is not NoneType]
    kind = kinds[0] if NoneType in get_args(kind) else kind
    return _LIMITS.get(kind, kind)


@dataclass(frozen=True, eq=False)
class _Record:
    """A record made of its own fields, with the limits of their types unless ``limits`` has others.

    A missing field takes its value in ``defaults``, or the record's own default.
    """

    limits: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def build(values: dict[str, Any]) -> Any:
            known = {
                name: tuple(value) if type(value) is list else value
                for name, value in values.items()
                if value is not None
            }
            try:
                return source(**{**self.defaults, **known})
            except UsageError as error:
                reason = {"reason": " ".join(str(error).rstrip(".").split())[:200]}
                raise PydanticCustomError("record", "is invalid: {reason}", reason) from None

        types, members = get_type_hints(source), {}
        for one in fields(source):
            limit = self.limits.get(one.name) or _limit(types[one.name])
            required = one.name not in self.defaults and one.default is one.default_factory
            schema = handler.generate_schema(limit if required else limit | None)
            members[one.name] = core_schema.typed_dict_field(schema, required=required)
        strict = core_schema.CoreConfig(strict=True)
        return core_schema.no_info_after_validator_function(
            build, core_schema.typed_dict_schema(members, config=strict)
        )


# ------------------------------------------------------------------ a conversation


class Document(TypedDict, total=False):
    """The format and version of a file."""

    format: Label | None
    version: Count | None
    layout: Label | None


class Conversation(TypedDict, total=False):
    """A conversation without its messages."""

    id: Link | None
    title: Annotated[str, Field(max_length=100_000)] | None
    created_at: Time | None


class Part(TypedDict, total=False):
    """A part of a reply; see ``records.Part``."""

    kind: Required[PartKind]
    text: Required[Text]
    start: Count | None
    end: Count | None
    name: Label | None
    arguments: Annotated[Any, AfterValidator(_shallow)]


Parts = Annotated[list[Part], _ENTRIES]
Policy = Annotated[records.CapturePolicy, _Record()]
ReplyChecks = Annotated[
    records.ReplyChecks,
    _Record({"steps": Annotated[list[Count], _up_to(MAX_CELLS)]}, {"steps": ()}),
]
TemplateOptions = Annotated[
    records.TemplateOptions,
    _Record(
        {
            "arguments": Annotated[dict[str, Any], AfterValidator(_shallow)],
            "tools": Annotated[list[Any], _ENTRIES, AfterValidator(_shallow)],
        }
    ),
]


class EarlierMessage(TypedDict, total=False):
    """A message before a trace, as the trace repeats it."""

    role: Required[Annotated[Role, Field(strict=False)]]
    content: Required[Text]
    parts: Parts | None
    tool_name: Label | None


class Message(EarlierMessage, total=False):
    """A message without its trace. Replies alone have the fields after ``created_at``."""

    id: Link | None
    status: Annotated[Status, Field(strict=False)] | None
    created_at: Time | None
    reason: Annotated[str, Field(max_length=100_000)] | None
    choice: Annotated[records.ModelChoice, _Record()] | None
    sampling: Annotated[records.Sampling, _Record({"seed": Link})] | None
    policy: Policy | None
    seconds: Duration | None
    tokens: Count | None
    tensors_pruned_at: Time | None
    checks: ReplyChecks | None
    template: TemplateOptions | None
    digest: MessageDigest | None
    parent_id: Link | None
    branch_of: Link | None
    branch_step: Count | None
    forced: (
        Annotated[records.Forced, _Record({"token_ids": _FORCED, "text": Text}, {"token_ids": ()})]
        | None
    )


# ------------------------------------------------------------------------- a reply


# Of a reply whose file does not say; a step's numbers are then NaN.
GENERATION: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 0,
    "eos_token_ids": (),
    **dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty", "seed")),
}
CAPTURE: dict[str, Any] = {
    "policy": records.CapturePolicy(tensors="none"),
    "width": 0,
    "attention_layers": (),
    **dict.fromkeys(("dtype", "device", "versions"), "unknown"),
    **dict.fromkeys(("quantization", "attention_check", "lens_reason", "lens_check")),
    "evidence_provenance": "",
    "logit_lens_available": False,
}
Generation = Annotated[records.Generation, _Record({"seed": Link}, GENERATION)]
Capture = Annotated[
    records.CaptureReport,
    _Record(
        {
            "policy": Policy,
            "layers": Layer,
            "width": Count,
            "attention_layers": Annotated[list[Layer], _OF_LAYERS],
            "windows": Annotated[list[Rank], Field(min_length=2, max_length=2)],
            "speedups": Annotated[dict[Label, Label | None], Field(max_length=MAX_SPEEDUPS)],
        },
        CAPTURE,
    ),
]


class Trace(TypedDict, total=False):
    """A trace without its ``steps`` and ``prompt_steps``. Only version 1 has no ``capture``."""

    format: Label | None
    version: Count | None
    model_id: Label | None
    prompt: Text | None
    prompt_len: Annotated[int, Field(ge=0, le=MAX_PROMPT)] | None
    prompt_token_ids: Annotated[list[Count | None], _OF_PROMPT] | None
    prompt_tokens: Annotated[list[Token], _OF_PROMPT] | None
    prompt_segments: Annotated[list[Segment], _OF_PROMPT] | None
    prefix_len: Annotated[int, Field(ge=0, le=MAX_PROMPT)] | None
    output: Text | None
    messages: Annotated[list[EarlierMessage], _up_to(MAX_MESSAGES)] | None
    status: Annotated[Status, Field(strict=False)] | None
    reason: Annotated[str, Field(max_length=100_000)] | None
    evidence_provenance: Label | None
    logit_lens_available: bool | None
    generation: Generation | None
    capture: Capture | None
    checks: ReplyChecks | None
    parts: Parts | None
    template: TemplateOptions | None


# -------------------------------------------------------------------------- a step


class LensToken(TypedDict, total=False):
    """A token of the lens at one layer."""

    rank: Rank | None
    token_id: Count | None
    token: Required[Token]
    logit: Number | None
    prob: EntryProb | None


class Candidate(LensToken, total=False):
    """A candidate for the next token."""

    sampled_prob: EntryProb | None
    noise: Number | None


class Attended(TypedDict, total=False):
    """A position that a layer attended to."""

    rank: Rank | None
    position: Required[Position]
    weight: EntryProb | None


class Evidence(Attended, total=False):
    """The same for the final layer, with the fields of version 1."""

    token: Token | None
    relative: Annotated[int, Field(ge=-MAX_PROMPT, le=MAX_STEPS)] | None


class AttentionLayer(TypedDict, total=False):
    """The attention of one layer, the most attended position first."""

    layer: Required[Layer]
    topk: Annotated[list[Attended], _ENTRIES] | None
    missing: Share | None


class LensLayer(TypedDict, total=False):
    """The lens at one layer, the most likely token first."""

    layer: Required[Layer]
    topk: Annotated[list[LensToken], _ENTRIES] | None
    chosen_rank: Rank | None
    chosen_prob: EntryProb | None
    entropy: Nats | None
    kl: Nats | None


Lens = Annotated[list[LensLayer], _OF_LAYERS]


class Expert(TypedDict, total=False):
    """An expert that a router chose."""

    rank: Rank | None
    expert: Required[Count]
    weight: Number | None


class RouterLayer(TypedDict, total=False):
    """The experts of one layer, the largest weight first."""

    layer: Required[Layer]
    topk: Annotated[list[Expert], _ENTRIES] | None


class Contender(TypedDict, total=False):
    """A token in the draw."""

    token_id: Count | None
    token: Required[Token]
    sampled_prob: Prob | None
    noise: Number | None


Effect = Annotated[
    records.Effect,
    _Record(
        {"removed_mass": Share, "chosen_prob": Prob}, {"removed_mass": _NAN, "chosen_prob": _NAN}
    ),
]


class Decision(TypedDict, total=False):
    """Why the token was chosen; see ``records.Decision``."""

    drawn: Required[bool]
    candidates: Required[Count]
    noise: Number | None
    greedy: Required[Contender]
    runner_up: Contender | None
    processors: Annotated[list[Effect], _ENTRIES] | None


class Step(TypedDict, total=False):
    """A step of a trace, generated or given; see ``records.Step``."""

    step: Count | None
    origin: Origin | None
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
    logit_lens: Lens | None
    lenses: Annotated[dict[LensName, Lens], Field(max_length=MAX_LENSES)] | None
    router: Annotated[list[RouterLayer], _OF_LAYERS] | None
    digest: StepDigest | None
    tensor_digest: StepDigest | None


class Line(TypedDict, total=False):
    """The fields of a ``jsonl`` line that say which list of which reply its step belongs to."""

    message: Required[Link]
    origin: Origin | None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # The types within it inherit this.
    kind.__pydantic_config__ = ConfigDict(strict=True, extra="ignore")
    return TypeAdapter(kind)


def read(kind: type[_T], value: Any, where: str) -> _T:
    """``value`` validated as ``kind``, a type of this module.

    Raises ExchangeError, which names the field within ``where``.
    """
    hashable: Any = kind
    try:
        checked: _T = _adapter(hashable).validate_python(value)
    except ValidationError as error:
        raise invalid(where, error) from error
    return checked


def value_or(values: Any, name: str, default: Any) -> Any:
    """The value of a field; ``default`` where it is missing or null."""
    value = values.get(name)
    return default if value is None else value
