"""Reads the steps of a prompt's tokens, some of which belong to an earlier turn.

The prompt of a second turn begins with the first turn's prompt and reply. These tokens
are not traced again: their steps are found by the longest common prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from sqlalchemy import select

from oki_trace.errors import NotFound
from oki_trace.records import Message, StepSummary
from oki_trace.store.reading.messages import MessageReads
from oki_trace.store.reading.steps import StepReads
from oki_trace.store.schema.models import Step


@dataclass(frozen=True, slots=True)
class PromptStep:
    """A traced token of a prompt, and the message whose step it is: its own, or an earlier."""

    message_id: int
    step: StepSummary


class PromptReads(MessageReads, StepReads):
    """The read methods about the steps of a prompt."""

    def prompt_steps(self, message_id: int) -> dict[int, PromptStep]:
        """The traced tokens of a reply's prompt, by position; empty where it was not traced."""
        own = {s.position: PromptStep(message_id, s) for s in self.steps(message_id, given=True)}
        message = self.message(message_id)
        if message.policy is None or message.policy.trace_prompt is None:
            return own
        missing = min(own, default=message.prompt_len or 0)
        if missing <= 1:
            return own
        earlier_id, length = self.traced_prefix(message, self.prompt(message_id).token_ids)
        if earlier_id is None:
            return own
        earlier = self.prompt_steps(earlier_id) | {
            step.position: PromptStep(earlier_id, step) for step in self.steps(earlier_id)
        }
        shared = {at: step for at, step in earlier.items() if at < min(length, missing)}
        return dict(sorted((shared | own).items()))

    def prefix_steps(self, message_id: int) -> dict[int, PromptStep]:
        """The steps of a branch's beginning, by position: those of the reply it departs from.

        Empty for a reply that is no branch, and where that reply was deleted.
        """
        message = origin = self.message(message_id)
        if message.prompt_len is None:
            return {}
        known: dict[int, PromptStep] = {}
        seen = {message_id}  # a damaged store may have a loop of branches
        # From the nearest reply back: each has its own tokens of the path.
        while origin.branch_of is not None and origin.branch_of not in seen:
            seen.add(origin.branch_of)
            try:
                origin = self.message(origin.branch_of)
            except NotFound:
                break
            of_origin = {s.position: PromptStep(origin.id, s) for s in self.steps(origin.id)}
            known = of_origin | known
        ids = self.prompt(message_id).token_ids
        first = message.prompt_len - message.prefix_len
        return {
            position: known[position]
            for position in range(first, message.prompt_len)
            if position in known and known[position].step.token_id == ids[position]
        }

    def traced_prefix(self, message: Message, token_ids: Sequence[int]) -> tuple[int | None, int]:
        """The earlier reply whose traced tokens share the longest beginning with ``token_ids``.

        (its id, the length), of the conversation's replies by the same model whose prompt
        was traced at least as fully as this one's; (None, 0) without any.
        """
        best: tuple[int | None, int] = (None, 0)
        for earlier in self.messages(message.conversation_id):
            if earlier.position >= message.position:
                break
            if _traces(earlier, message):
                known = [*self.prompt(earlier.id).token_ids, *self._token_ids(earlier.id)]
                pairs = zip(known[: self._traced_length(earlier)], token_ids, strict=False)
                length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                best = max(best, (earlier.id, length), key=lambda pair: pair[1])
        return best

    def _traced_length(self, message: Message) -> int:
        """How many tokens, from the first on, have a step: a stopped trace ends early."""
        traced = {*self.prompt_steps(message.id), *(s.position for s in self.steps(message.id))}
        return next(position for position in count(1) if position not in traced)

    def _token_ids(self, message_id: int) -> list[int]:
        query = select(Step.token_id).where(
            Step.message_id == message_id, Step.step_index.is_not(None)
        )
        return self.scalars(query.order_by(Step.step_index))


def _traces(earlier: Message, message: Message) -> bool:
    """Whether the steps of ``earlier`` can stand for those of the same tokens of ``message``."""
    if earlier.policy is None or message.policy is None or earlier.capture is None:
        return False
    if earlier.model_id != message.model_id or earlier.choice != message.choice:
        return False  # another model, or the same in another dtype or quantization
    if earlier.status.is_live or earlier.capture.windows is not None:
        return False
    if message.policy.lens_layers not in (None, earlier.policy.lens_layers):
        return False  # read at other layers of the lens
    levels = (earlier.policy.trace_prompt, message.policy.trace_prompt)
    return levels in (("light", "light"), ("full", "light"), ("full", "full"))
