"""A trace as version 1 of the format has it: what the tool replaced writes and shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oki_trace.exchange.trace_object import TraceHead, head_object, step_objects
from oki_trace.records import Step

# Names of version 1, of the trace and of a step; docs/formats.md lists them all.
TRACE = (
    *("model_id", "prompt", "output", "prompt_len", "messages"),
    *("evidence_provenance", "logit_lens_available"),
)
STEP = ("step", "chosen_token", "chosen_id")
CANDIDATE = ("token", "prob")
EVIDENCE = ("token", "weight", "position", "in_prompt", "relative")


def v1_head(head: TraceHead) -> dict[str, Any]:
    """The trace up to its ``steps``."""
    return _only(head_object(head), TRACE)


def v1_steps(head: TraceHead, steps: Iterator[Step]) -> Iterator[dict[str, Any]]:
    """Each step as it comes."""
    for step in step_objects(head.prompt, steps):
        yield {
            **_only(step, STEP),
            "logits_topk": [_only(entry, CANDIDATE) for entry in step["logits_topk"]],
            "evidence": [_only(entry, EVIDENCE) for entry in step["evidence"]],
            "logit_lens": [
                {
                    "layer": row["layer"],
                    "topk": [_only(entry, CANDIDATE) for entry in row["topk"]],
                }
                for row in step["logit_lens"]
            ],
        }


def _only(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names}
