"""The tables and functions that SQL can use, with the meaning of each column.

Names and types are the store's own (``Base.metadata``). Columns declared here with a type are
derived: they save a question a join or a scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from oki_trace.analysis.head_targets import HEAD_TARGETS
from oki_trace.store.schema.arrow import arrow_types

# DuckDB's types, as Arrow has them.
_ARROW: dict[str, pa.DataType] = {
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR": pa.string(),
    "TIMESTAMP": pa.timestamp("us"),
}


@dataclass(frozen=True, slots=True)
class Column:
    """``kind`` is DuckDB's type."""

    name: str
    kind: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """``columns`` in order; ``meaning`` says what a row is."""

    name: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the table; times are in UTC, without a zone."""
        return pa.schema([(column.name, _ARROW[column.kind]) for column in self.columns])


@dataclass(frozen=True, slots=True)
class Function:
    """``parameters``: their names and types; ``returns``: the type of the value."""

    name: str
    parameters: dict[str, str]
    returns: str
    meaning: str


def _table(name: str, meaning: str, columns: dict[str, str | tuple[str, str]]) -> Table:
    """A table by its columns: a meaning, or a type and a meaning for a derived column."""
    kinds = {arrow: kind for kind, arrow in _ARROW.items()}
    kinds[pa.timestamp("us", tz="UTC")] = "TIMESTAMP"
    stored = arrow_types(name)
    return Table(
        name,
        meaning,
        tuple(
            Column(column, kinds[stored[column]], text)
            if isinstance(text, str)
            else Column(column, *text)
            for column, text in columns.items()
        ),
    )


_LENS = "logit: the Logit Lens; else the name of an installed lens"
_OF_STEP: dict[str, str | tuple[str, str]] = {
    "message_id": ("BIGINT", "the reply"),
    "step_id": "the step",
    "step_index": ("INTEGER", "the step's number in the reply; NULL: a given token's"),
}

TABLES: tuple[Table, ...] = (
    _table(
        "conversation",
        "a conversation",
        {
            "id": "the conversation's number",
            "title": "its title",
            "created_at": "when it began, in UTC",
            "updated_at": "when a message was last added or ended, in UTC",
        },
    ),
    _table(
        "message",
        "a message; the columns after created_at are of replies only",
        {
            "id": "the message's number",
            "conversation_id": "its conversation",
            "position": "its place in the conversation, from 0",
            "role": "system, user, assistant or tool",
            "content": "its text; of a reply the answer",
            "status": "queued, running, complete, stopped, failed or interrupted",
            "created_at": "when it was written or requested, in UTC",
            "model_id": "the model",
            "prompt_len": "tokens of the prompt",
            "tokens": ("INTEGER", "tokens of the reply"),
            "seconds": "how long it took",
            "reason": "why it ended",
            "layers": ("INTEGER", "the model's last layer"),
            "dtype": ("VARCHAR", "the dtype that the model computed in"),
            "device": ("VARCHAR", "the device that it ran on"),
            "quantization": ("VARCHAR", "how its weights were quantized; NULL: not at all"),
            "temperature": ("DOUBLE", "NULL when greedy"),
            "top_p": ("DOUBLE", "nucleus sampling"),
            "top_k": ("INTEGER", "sampling among the k most likely"),
            "repetition_penalty": ("DOUBLE", "1 is off"),
            "seed": ("BIGINT", "the seed of the draws"),
            "prompt_hash": ("VARCHAR", "the same for all replies to the same messages"),
            "thinking": ("VARCHAR", "the text that a reply marked as thinking; NULL: none"),
            "tool_calls": (
                "VARCHAR",
                "its tool calls with arguments, a JSON list; NULL: none",
            ),
            "tool_name": "the tool whose answer a message is",
            "trace_prompt": ("VARCHAR", "light or full: how its prompt was traced; NULL: not"),
            "score_of": "the message whose text it scores",
            "parent_id": "the message that it follows; NULL for the first",
            "branch_of": "the reply that it departs from; NULL: it is no branch",
            "branch_step": "the step of that reply from which on it differs",
            "prefix_len": "tokens at the end of its prompt that are its beginning",
        },
    ),
    _table(
        "step",
        "a token that the model predicted: a generated one, or one of a traced prompt",
        {
            "id": "the step's number",
            "message_id": "the reply",
            "step_index": "its number in the reply, from 0; NULL for a given token",
            "origin": "sampled or forced: generated; given: a token of the prompt",
            "position": "its place in the sequence that the model saw",
            "token_id": "the token",
            "token": "the token's text",
            "is_special": "whether it is one of the model's control tokens",
            "token_class": (
                "VARCHAR",
                "new word, rest of a word, number, punctuation, space or special",
            ),
            "logit": "the model's own",
            "prob": "the model's own, before sampling",
            "logprob": "its logarithm, in nats",
            "entropy": "of the model's distribution, in nats",
            "rank": "1: the most likely",
            "margin": "prob of rank 1 minus that of rank 2",
            "sampled_prob": "prob after the sampling settings",
            "greedy_id": "the token that greedy decoding would have chosen",
            "elapsed_ms": "time of the step",
            "settle_layer": "first layer from which the token stays on top; NULL: it never does",
            "settle_prob": ("DOUBLE", "the token's prob at that layer"),
            "layers": ("INTEGER", "the last layer of its Logit Lens; NULL: no lens"),
            "runner_up_id": ("INTEGER", "the most likely token that was not chosen"),
            "runner_up_token": ("VARCHAR", "its text"),
            "runner_up_prob": ("DOUBLE", "its prob"),
        },
    ),
    _table(
        "topk_entry",
        "a candidate for a step's token",
        {
            **_OF_STEP,
            "rank": "1: the most likely",
            "token_id": "the token",
            "token": "its text",
            "logit": "the model's own",
            "prob": "the model's own",
            "sampled_prob": "after the sampling settings",
        },
    ),
    _table(
        "lens_layer",
        "a lens at a layer and a step; an installed lens may lack layers",
        {
            **_OF_STEP,
            "lens": _LENS,
            "layer": "0: the embedding; the last: the model's own distribution",
            "entropy": "of the layer's distribution, in nats",
            "chosen_rank": "the rank of the chosen token",
            "chosen_prob": "its prob",
            "kl": "KL(model's own distribution ‖ this layer's), in nats",
            "top_id": ("INTEGER", "the layer's most likely token"),
            "top_token": ("VARCHAR", "its text"),
            "top_prob": ("FLOAT", "its prob"),
        },
    ),
    _table(
        "lens_entry",
        "a token that a lens reads at a layer",
        {
            **_OF_STEP,
            "lens": _LENS,
            "layer": "the layer",
            "rank": "1: the most likely",
            "token_id": "the token",
            "token": "its text",
            "logit": "the layer's",
            "prob": "the layer's",
        },
    ),
    _table(
        "attention_layer",
        "how a layer's attention is divided at a step, averaged over heads",
        {
            **_OF_STEP,
            "layer": "the layer",
            "is_evidence": ("BOOLEAN", "whether it is the last layer that has attention"),
            "first_token": ("FLOAT", "on position 0, whatever it is"),
            "system": ("FLOAT", "on the system message"),
            "user": ("FLOAT", "on the user's messages"),
            "assistant": ("FLOAT", "on earlier replies"),
            "template": ("FLOAT", "on the chat template around the messages"),
            "reply": ("FLOAT", "on this reply's own tokens"),
            "rest": ("FLOAT", "on positions below the recorded ones"),
            "missing": "on no position: a learned sink",
        },
    ),
    _table(
        "attention_entry",
        "a position that a layer attends to, averaged over heads",
        {
            **_OF_STEP,
            "layer": "the layer",
            "rank": "1: the most attended",
            "position": "the position",
            "weight": "its weight",
        },
    ),
    _table(
        "router_entry",
        "an expert that a layer's router chose for a token; of mixtures of experts only",
        {
            **_OF_STEP,
            "layer": "the layer",
            "rank": "1: the largest weight",
            "expert": "the expert's number, from 0",
            "weight": "its weight",
        },
    ),
    _table(
        "prompt_token",
        "a token of a reply's prompt",
        {
            "message_id": "the reply",
            "position": "its place, from 0",
            "token_id": "the token",
            "token": "its text",
            "segment": "template, system, user, assistant, thinking, tool_call or tool",
        },
    ),
)

BY_NAME = {table.name: table for table in TABLES}

_STEP = {"message_id": "BIGINT", "step_index": "BIGINT"}
_DISTANCE = (
    "STRUCT(kl DOUBLE, kl_reverse DOUBLE, js DOUBLE, tv DOUBLE, tv_most DOUBLE, "
    "shared INTEGER, top_rank INTEGER, basis VARCHAR)"
)

# They read the full tensors, which no table holds, and give NULL where there is nothing to read.
FUNCTIONS: tuple[Function, ...] = (
    Function(
        "distance",
        {**_STEP, "other_message_id": "BIGINT", "other_step_index": "BIGINT"},
        _DISTANCE,
        "how far the distributions of two steps are apart: from the full logits where both kept "
        "them, else from the candidates, as basis says",
    ),
    Function(
        "distance_at",
        {
            "message_id": "BIGINT",
            "position": "BIGINT",
            "other_message_id": "BIGINT",
            "other_position": "BIGINT",
        },
        _DISTANCE,
        "the same of two steps by their positions, so that given tokens have it too",
    ),
    Function(
        "token_rank",
        {**_STEP, "token_id": "BIGINT"},
        "STRUCT(prob DOUBLE, rank INTEGER)",
        "any token's probability and rank at a step, from the full logits",
    ),
    Function(
        "head_shares",
        _STEP,
        "STRUCT(layer INTEGER, head INTEGER, shares DOUBLE[], focus DOUBLE)[]",
        "the weight that each head gives to "
        + ", ".join(f"{i} {target}" for i, target in enumerate(HEAD_TARGETS, start=1))
        + "; focus is its largest weight",
    ),
    Function(
        "keeps",
        {"message_id": "BIGINT", "tensor": "VARCHAR"},
        "BOOLEAN",
        "whether a reply has its full logits, hidden_states or attentions",
    ),
)
