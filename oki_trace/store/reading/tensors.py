"""Reads full tensors, and checks each one when it decodes it; see ``codecs.tensors``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Row, Select, select

from oki_trace.records import TensorRecord
from oki_trace.store.codecs.tensors import EncodedTensor, TensorHead, decode
from oki_trace.store.reading.messages import MessageReads
from oki_trace.store.reading.not_found import no_tensor
from oki_trace.store.reading.steps import StepReads, within
from oki_trace.store.schema.models import Step, Tensor

TENSOR_COLUMNS = [Tensor.__table__.columns[name] for name in EncodedTensor.__dataclass_fields__]
_HEAD_COLUMNS = [Tensor.__table__.columns[name] for name in TensorHead.__dataclass_fields__]


class TensorReads(MessageReads, StepReads):
    """The read methods about full tensors. Only those that return a TensorRecord read a blob."""

    def tensor(
        self, message_id: int, index: int, name: str, *, given: bool = False
    ) -> TensorRecord:
        """One full tensor. Raises NotFound with the reason, TensorError for a damaged one."""
        rows = self.rows(_of_step(message_id, index, name, *TENSOR_COLUMNS, given=given))
        if not rows:
            raise no_tensor(self.message(message_id), index, name, given=given)
        return tensor_record(rows[0])

    def tensors(
        self, message_id: int, name: str, steps: Sequence[int], *, given: bool = False
    ) -> dict[int, TensorRecord]:
        """The tensors of those ``steps`` that have one, by step_index, all in memory.

        With ``given``, those of the steps of given tokens, by position.
        """
        column = Step.position if given else Step.step_index
        query = _joined(column, *TENSOR_COLUMNS).where(
            *within(message_id, given=given), column.in_(steps), Tensor.name == name
        )
        return {row[0]: tensor_record(row) for row in self.rows(query)}

    def iter_tensors(
        self,
        message_id: int,
        name: str,
        first: int = 0,
        end: int | None = None,
        *,
        given: bool = False,
    ) -> Iterator[tuple[int, TensorRecord]]:
        """(step_index, tensor) of the steps from ``first`` up to ``end`` that have one.

        With ``given``, (position, tensor) of the steps of given tokens. One at a time, each
        in a transaction of its own, so the caller may take its time.
        """
        column = Step.position if given else Step.step_index
        own = within(message_id, first, end, given=given)
        for index in self.scalars(
            _joined(column).where(*own, Tensor.name == name).order_by(column)
        ):
            yield index, self.tensor(message_id, index, name, given=given)

    def tensor_names(self, message_id: int, index: int, *, given: bool = False) -> list[str]:
        """The names of a step's full tensors."""
        query = _joined(Tensor.name).where(*within(message_id, index, index + 1, given=given))
        return self.scalars(query.order_by(Tensor.name))

    def tensor_shape(
        self, message_id: int, index: int, name: str, *, given: bool = False
    ) -> tuple[int, ...] | None:
        """The shape of a full tensor; None where it was not kept."""
        shape = self.scalar(_of_step(message_id, index, name, Tensor.shape, given=given))
        return None if shape is None else tuple(shape)

    def tensor_heads(
        self, message_id: int, *, given: bool = False
    ) -> Iterator[tuple[int, TensorHead]]:
        """(step_index, tensor without its numbers) of all full tensors of a reply, in order.

        With ``given``, those of the steps of given tokens, by position.
        """
        column, first = (Step.position if given else Step.step_index), 0
        while ids := self.step_ids(message_id, first, given=given):
            end = max(ids) + 1
            of_batch = within(message_id, first, end, given=given)
            query = _joined(column, *_HEAD_COLUMNS).where(*of_batch)
            for index, name, dtype, shape, layers, key_offset in self.rows(
                query.order_by(column, Tensor.name)
            ):
                yield index, TensorHead(name, dtype, tuple(shape), tuple(layers), key_offset)
            first = end

    def replies_with(self, name: str) -> set[int]:
        """The ids of the replies whose first step has this full tensor."""
        query = _joined(Step.message_id).where(Step.step_index == 0, Tensor.name == name)
        return set(self.scalars(query))


def _joined(*columns: Any) -> Select[Any]:
    return select(*columns).select_from(Tensor).join(Step, Step.id == Tensor.step_id)


def _of_step(
    message_id: int, index: int, name: str, *columns: Any, given: bool = False
) -> Select[Any]:
    return _joined(*columns).where(
        *within(message_id, index, index + 1, given=given), Tensor.name == name
    )


def tensor_record(row: Row[Any]) -> TensorRecord:
    """Decode a row that has the TENSOR_COLUMNS. Raises TensorError for a damaged one."""
    values = {name: getattr(row, name) for name in EncodedTensor.__dataclass_fields__}
    lists = {name: tuple(values[name]) for name in ("shape", "layers")}
    return decode(EncodedTensor(**values | lists | {"data": bytes(row.data)}))
