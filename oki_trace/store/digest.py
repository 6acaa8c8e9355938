"""What a trace was when it was recorded, as a few bytes each: any later change shows.

A step has two digests: of its rows, and of its full tensors by themselves, which
pruning removes. A message has one that covers what it says, its settings, its
prompt and the digests of all its steps, so that none can be changed, left out or
moved. They are of what is meant, not of how it is kept: the same in a copy, in an
import of an export, on either engine, in whichever codec. What cannot be told in
JSON is not told apart: infinities and NaN count as one, -0 as 0, and a token whose
id is not known has none. They find damage and mistakes; whoever forges a trace can
make new ones.
"""

from __future__ import annotations

import datetime as dt
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b, sha256
from itertools import chain
from typing import Any

import numpy as np

from oki_trace.records import (
    Contender,
    Decision,
    FloatArray,
    IntArray,
    Lens,
    Step,
    Tensor,
)
from oki_trace.store.schema.column_types import storable

# In the place of a message's digest: it was recorded before there were any.
BEFORE_DIGESTS = ""

_STEP_BYTES = 16
_MESSAGE_BYTES = 32
# step_index, position, token_id, is_special, rank, sampled_prob and the other measured
# numbers, how many candidates and layers of attention there are
_OF_STEP = struct.Struct("<qqq?q7dqq")
_UNKNOWN = -1


def of_step(step: Step) -> bytes:
    """Of a step's rows without its lens, which may come later; see ``with_lens``."""
    top, seen = step.topk, step.attention
    sampled_prob = math.nan if step.sampled_prob is None else step.sampled_prob
    measured = (step.logit, step.prob, step.logprob, step.entropy, step.margin, step.elapsed_ms)
    count = len(top.tokens)
    nothing = np.full(count, np.nan, dtype=np.float32)
    after = (nothing if one is None else one for one in (top.sampled_probs, top.noise))
    parts = (
        _OF_STEP.pack(
            step.step_index,
            step.position,
            max(step.token_id, _UNKNOWN),
            step.is_special,
            step.rank,
            *map(_number, (sampled_prob, *measured)),
            count,
            len(seen),
        ),
        _numbers([float(one.missing) for one in seen]),
        _texts([step.token, step.token_bytes.hex(), *top.tokens]),
        _ids([top.token_ids, *(one.positions for one in seen)]),
        _ids([np.array([(one.layer, len(one.positions)) for one in seen], dtype=np.int64)]),
        _floats([top.logits, top.probs, *after, *(one.weights for one in seen)]),
        b"" if step.decision is None else _decision(step.decision),
    )
    return _hashed(b"oki step 1", parts)


def with_lens(digest: bytes, lens: Lens) -> bytes:
    """Of a step and its lens, from the step's own."""
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
    """Of a step with what there is of its lens."""
    own = of_step(step)
    return own if step.lens is None else with_lens(own, step.lens)


def of_tensors(tensors: Iterable[Tensor]) -> bytes | None:
    """Of the full tensors of one step; None when there are none."""
    # Half a megabyte a step, of which processors make this one the fastest.
    made = sha256(b"oki tensors 1")
    several = sorted(tensors, key=lambda tensor: tensor.name)
    for tensor in several:
        layers = [int(layer) for layer in tensor.layers]
        meaning = (tensor.name, tensor.dtype, [*tensor.array.shape], layers, int(tensor.key_offset))
        made.update(_texts([repr(meaning)]))
        array = tensor.array
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        made.update(np.ascontiguousarray(little).data.cast("B"))
    return made.digest()[:_STEP_BYTES] if several else None


class PromptDigest:
    """Of a prompt's tokens, given some at a time."""

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
        made = blake2b(digest_size=_MESSAGE_BYTES, person=b"oki prompt 1")
        made.update(self._count.to_bytes(8, "little"))
        for part in self._parts:
            made.update(part.digest())
        return made.hexdigest()


class MessageDigest:
    """Of a message: its fields, the digest of its prompt, and those of its steps in order."""

    def __init__(self, fields: Mapping[str, Any], prompt: str | None) -> None:
        self._made = blake2b(digest_size=_MESSAGE_BYTES, person=b"oki message 1")
        self._made.update(_document(fields))
        self._made.update(_texts([prompt or ""]))

    def add(self, digest: bytes | None, tensor_digest: bytes | None) -> None:
        """The next step."""
        for one in (digest, tensor_digest):
            told = one or b""
            self._made.update(bytes([len(told)]) + told)

    def hex(self) -> str:
        return self._made.hexdigest()


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
    """One after another, in one go: there are dozens, and each is short."""
    told = np.concatenate([one.ravel() for one in arrays], dtype="<f4", casting="same_kind")
    told += np.float32(0)  # -0 becomes 0
    told[~np.isfinite(told)] = np.nan
    return told.tobytes()


def _ids(arrays: Iterable[IntArray]) -> bytes:
    told = np.concatenate([one.ravel() for one in arrays], dtype="<i8", casting="same_kind")
    return np.maximum(told, _UNKNOWN, out=told).tobytes()


def _texts(texts: Sequence[str]) -> bytes:
    """Each ended by NUL, which no storable text has in it."""
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
    for one in contenders:
        if one is not None:
            texts.append(one.token)
            numbers += (max(one.token_id, _UNKNOWN), one.prob, one.noise)
    told = [math.nan if number is None else number for number in numbers]
    return _numbers(told) + _texts(texts)


def _document(values: Any) -> bytes:
    """A JSON document, whatever wrote it; what is missing, null, false or empty is one."""
    parts: list[str] = []
    _tell(values, parts)
    return _texts([*parts, "end"])


def _tell(value: Any, parts: list[str]) -> None:
    if isinstance(value, Mapping):
        parts.append("{")
        for name in sorted(value):
            if not _is_nothing(value[name]):
                parts.append(name)
                _tell(value[name], parts)
        parts.append("}")
    elif isinstance(value, list | tuple):
        parts.append(f"[{len(value)}")
        for item in value:
            _tell(item, parts)
    elif isinstance(value, str):
        parts.append(f"s{value}")
    elif isinstance(value, dt.datetime):
        parts.append(f"t{value.astimezone(dt.UTC).isoformat()}")
    else:
        parts.append(_plain(value))


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (not isinstance(value, int | float) and not value)


def _plain(value: Any) -> str:
    """None, a truth or a number: 1 and 1.0 are the same, as they are in JSON."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "None"
        if value.is_integer() and abs(value) < 2**53:
            return repr(int(value))
    return repr(value)
