"""Digests of steps and messages, computed when they are recorded: they reveal any later change.

A step has two digests: one of its rows, and one of its full tensors, which pruning
removes. A message has one that covers its text, its settings, its prompt and the
digests of all its steps, so that no step can be changed, left out or moved. Digests
cover values, not their encoding: they are the same in a copy, in an import of an
export, on either engine and in every codec. Values that JSON does not distinguish
have the same digest: infinities and NaN, -0 and 0, and all unknown token ids.
A step's readings by installed lenses are not covered: they can be added at any time and
made again from its hidden states.
Digests detect damage and mistakes, but not forgery: a forger can compute new digests.
"""

from __future__ import annotations

import datetime as dt
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from itertools import chain
from typing import Any

import numpy as np

from oki_trace.records import (
    Contender,
    Decision,
    FloatArray,
    IntArray,
    LayerRouting,
    Lens,
    Message,
    Step,
    TensorRecord,
)
from oki_trace.store.schema.column_types import storable

# The digest of a message that was recorded by a program without digests.
BEFORE_DIGESTS = ""

_STEP_BYTES = 16
_MESSAGE_BYTES = 32
# step_index (-1: a given token), position, token_id, is_special, rank, sampled_prob and the
# other measured numbers, how many candidates and layers of attention there are
_OF_STEP = struct.Struct("<qqq?q7dqq")
_UNKNOWN = -1


def of_step(step: Step) -> bytes:
    """The digest of a step's rows without its lens, which may come later; see ``with_lens``."""
    top, attention = step.topk, step.attention
    sampled_prob = math.nan if step.sampled_prob is None else step.sampled_prob
    measured = (step.logit, step.prob, step.logprob, step.entropy, step.margin, step.elapsed_ms)
    count = len(top.tokens)
    missing = np.full(count, np.nan, dtype=np.float32)
    drawn = (missing if one is None else one for one in (top.sampled_probs, top.noise))
    parts: tuple[bytes, ...] = (
        _OF_STEP.pack(
            step.step_index,
            step.position,
            max(step.token_id, _UNKNOWN),
            step.is_special,
            step.rank,
            *map(_number, (sampled_prob, *measured)),
            count,
            len(attention),
        ),
        _numbers([float(one.missing) for one in attention]),
        _texts([step.token, step.token_bytes.hex(), *top.tokens]),
        _ids([top.token_ids, *(one.positions for one in attention)]),
        _ids([np.array([(one.layer, len(one.positions)) for one in attention], dtype=np.int64)]),
        _floats([top.logits, top.probs, *drawn, *(one.weights for one in attention)]),
        b"" if step.decision is None else _decision(step.decision),
    )
    if step.origin == "forced":  # the step_index tells sampled and given tokens apart
        parts = (*parts[:-1], parts[-1] + _texts([step.origin]))
    if step.router:
        parts = (*parts, _router(step.router))
    return _hashed(b"oki step 1", parts)


def with_lens(digest: bytes, lens: Lens) -> bytes:
    """The digest of a step with its lens, from that of the step alone."""
    measured = (lens.logits, lens.probs, lens.entropy, lens.chosen_prob, lens.kl)
    parts = (
        digest,
        struct.pack("<qq", *lens.token_ids.shape),
        _ids([lens.token_ids, lens.chosen_rank]),
        _texts(list(chain.from_iterable(lens.tokens))),
        _floats(measured),
    )
    return _hashed(b"oki lens 1", parts)


def of_whole_step(step: Step) -> bytes:
    """The digest of a step, with its lens if it has one."""
    digest = of_step(step)
    return digest if step.lens is None else with_lens(digest, step.lens)


def of_tensors(tensors: Iterable[TensorRecord]) -> bytes | None:
    """The digest of the full tensors of one step; None when there are none."""
    # A step has half a megabyte; SHA-256 is the fastest, because processors compute it.
    digest = sha256(b"oki tensors 1")
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    for tensor in ordered:
        layers = [int(layer) for layer in tensor.layers]
        meaning = (tensor.name, tensor.dtype, [*tensor.array.shape], layers, int(tensor.key_offset))
        digest.update(_texts([repr(meaning)]))
        array = tensor.array
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).data.cast("B"))
    return digest.digest()[:_STEP_BYTES] if ordered else None


def is_as_recorded(step: Step) -> bool:
    """Whether a step and its full tensors match the digests that it has.

    True for a step without digests, and for tensors that were left out.
    """
    if step.digest is not None and step.digest != of_whole_step(step):
        return False
    left_out = step.tensor_digest is None or not step.tensors
    return left_out or step.tensor_digest == of_tensors(step.tensors)


def step_changes(message: Message, step: Step) -> Iterator[str]:
    """A sentence if the rows of a stored step do not match its digest."""
    if step.digest is None:
        if message.digest != BEFORE_DIGESTS:
            yield "its digest is missing"
    elif step.digest != of_whole_step(step):
        yield "its rows are not those that were recorded (the digest differs)"


def tensor_changes(message: Message, step: Step, tensors: Sequence[TensorRecord]) -> Iterator[str]:
    """A sentence if ``tensors``, all of the step's, do not match their digest."""
    if step.tensor_digest is None:
        if message.digest != BEFORE_DIGESTS:
            yield "the digest of its tensors is missing"
    elif step.tensor_digest != of_tensors(tensors):
        yield "its tensors are not those that were recorded (the digest differs)"


class PromptDigest:
    """The digest of a prompt's tokens, some at a time."""

    def __init__(self) -> None:
        self._count = 0
        self._parts = [blake2b(digest_size=_MESSAGE_BYTES) for _ in range(3)]

    def add(
        self, token_ids: Sequence[int], tokens: Sequence[str], segments: Sequence[str]
    ) -> PromptDigest:
        """The next tokens, in the order of their positions."""
        self._count += len(token_ids)
        ids, texts, sources = self._parts
        ids.update(_ids([np.array(token_ids, dtype=np.int64)]))
        texts.update(_texts(tokens))
        sources.update(_texts(segments))
        return self

    def hex(self) -> str:
        digest = blake2b(digest_size=_MESSAGE_BYTES, person=b"oki prompt 1")
        digest.update(self._count.to_bytes(8, "little"))
        for part in self._parts:
            digest.update(part.digest())
        return digest.hexdigest()


class MessageDigest:
    """The digest of a message: its fields, and the digests of its prompt and steps in order."""

    def __init__(self, fields: Mapping[str, Any], prompt: str | None) -> None:
        self._digest = blake2b(digest_size=_MESSAGE_BYTES, person=b"oki message 1")
        self._digest.update(_document(fields))
        self._digest.update(_texts([prompt or ""]))

    def add(self, digest: bytes | None, tensor_digest: bytes | None) -> None:
        """Add the digests of the next step."""
        for part in (digest or b"", tensor_digest or b""):
            self._digest.update(bytes([len(part)]) + part)

    def hex(self) -> str:
        return self._digest.hexdigest()


# ------------------------------------------------------------------------- within


def _hashed(kind: bytes, parts: Sequence[bytes]) -> bytes:
    lengths = struct.pack(f"<{len(parts)}q", *map(len, parts))
    joined = b"".join((lengths, *parts))
    return blake2b(joined, digest_size=_STEP_BYTES, person=kind).digest()


def _number(value: float) -> float:
    return value + 0.0 if math.isfinite(value) else math.nan


def _numbers(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *map(_number, values))


def _floats(arrays: Iterable[FloatArray]) -> bytes:
    """Concatenated first: there are dozens of arrays, and each is short."""
    values = np.concatenate([one.ravel() for one in arrays], dtype="<f4", casting="same_kind")
    values += np.float32(0)  # -0 becomes 0
    values[~np.isfinite(values)] = np.nan
    return values.tobytes()


def _ids(arrays: Iterable[IntArray]) -> bytes:
    ids = np.concatenate([one.ravel() for one in arrays], dtype="<i8", casting="same_kind")
    return np.maximum(ids, _UNKNOWN, out=ids).tobytes()


def _texts(texts: Sequence[str]) -> bytes:
    """Each text ends with NUL, which no storable text contains."""
    joined = "\0".join((*texts, ""))
    if joined.count("\0") != len(texts) or not _encodable(joined):
        joined = "\0".join((*map(storable, texts), ""))
    return joined.encode()


def _encodable(text: str) -> bool:
    return text.isascii() or storable(text.replace("\0", "")) == text.replace("\0", "")


def _decision(decision: Decision) -> bytes:
    texts: list[str] = []
    numbers: list[float | None] = [decision.drawn, decision.candidates, decision.noise]
    for effect in decision.effects:
        texts += (effect.name, effect.setting)
        numbers += (effect.removed, effect.removed_mass, effect.chosen_prob)
    contenders: tuple[Contender | None, ...] = (decision.greedy, decision.runner_up)
    for contender in contenders:
        if contender is not None:
            texts.append(contender.token)
            numbers += (max(contender.token_id, _UNKNOWN), contender.prob, contender.noise)
    return _numbers([math.nan if one is None else one for one in numbers]) + _texts(texts)


def _router(router: Sequence[LayerRouting]) -> bytes:
    lengths = np.array([(one.layer, len(one.experts)) for one in router], dtype=np.int64)
    experts, weights = ([getattr(one, name) for one in router] for name in ("experts", "weights"))
    return _ids([lengths, *experts]) + _floats(weights)


def _document(values: Any) -> bytes:
    """A JSON document. A field that is null, false or empty counts as missing."""
    return _texts([*_document_parts(values), "end"])


def _document_parts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield "{"
        for name in sorted(value):
            if not _is_empty(value[name]):
                yield name
                yield from _document_parts(value[name])
        yield "}"
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}"
        for item in value:
            yield from _document_parts(item)
    elif isinstance(value, str):
        yield f"s{value}"
    elif isinstance(value, dt.datetime):
        yield f"t{value.astimezone(dt.UTC).isoformat()}"
    else:
        yield _scalar(value)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (not isinstance(value, int | float) and not value)


def _scalar(value: Any) -> str:
    """None, a truth value or a number: 1 and 1.0 are the same, as they are in JSON."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "None"
        if value.is_integer() and abs(value) < 2**53:
            return repr(int(value))
    return repr(value)
