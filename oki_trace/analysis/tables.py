"""The tables that a question can be asked of, with what each column means.

Names are the store's own. Beside its columns stand a few that save a question
a join or a scan: whose message a row is of, what the first candidate of a layer
is, how a layer's attention is shared out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oki_trace.analysis.head_targets import HEAD_TARGETS

Kind = Literal["BIGINT", "INTEGER", "DOUBLE", "FLOAT", "BOOLEAN", "VARCHAR", "TIMESTAMP"]


@dataclass(frozen=True, slots=True)
class Column:
    """``kind`` is DuckDB's type."""

    name: str
    kind: Kind
    meaning: str


@dataclass(frozen=True, slots=True)
class Table:
    """``columns`` in order; a row is what ``meaning`` says."""

    name: str
    meaning: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """``takes``: its arguments and their types; ``gives``: the type of its value."""

    name: str
    takes: dict[str, str]
    gives: str
    meaning: str


def _columns(text: str) -> tuple[Column, ...]:
    """A line a column: name, kind, meaning."""
    lines = (line.split(maxsplit=2) for line in text.splitlines() if line)
    return tuple(Column(name, kind, meaning) for name, kind, meaning in lines)  # type: ignore[arg-type]


_OF_STEP = """
message_id BIGINT the reply
step_id BIGINT the step
step_index INTEGER the step's number in the reply, from 0
"""

TABLES: tuple[Table, ...] = (
    Table(
        "conversation",
        "a conversation",
        _columns("""
id BIGINT its number
title VARCHAR its title
created_at TIMESTAMP when it began, in UTC
updated_at TIMESTAMP when a message was added or ended, in UTC
"""),
    ),
    Table(
        "message",
        "a message; what follows created_at is of replies only",
        _columns("""
id BIGINT its number
conversation_id BIGINT the conversation
position INTEGER its place in the conversation, from 0
role VARCHAR system, user, assistant or tool
content VARCHAR what was said; of a reply its answer
status VARCHAR queued, running, complete, stopped, failed or interrupted
created_at TIMESTAMP when it was said or asked for, in UTC
model_id VARCHAR the model
prompt_len INTEGER tokens of the prompt
tokens INTEGER tokens of the reply
seconds DOUBLE how long it took
reason VARCHAR why it ended
layers INTEGER the model's last layer
dtype VARCHAR what the model computed in
device VARCHAR where
quantization VARCHAR how its weights were held; NULL: as they are
temperature DOUBLE NULL when greedy
top_p DOUBLE nucleus sampling
top_k INTEGER sampling among the k most likely
repetition_penalty DOUBLE 1 is off
seed BIGINT the seed of the draws
prompt_hash VARCHAR the same for all replies to the same messages
thinking VARCHAR what a reply thought; NULL: nothing
tool_calls VARCHAR the tools that a reply called, with their arguments, as a JSON list; NULL: none
tool_name VARCHAR the tool whose answer a message is
"""),
    ),
    Table(
        "step",
        "a generated token",
        _columns("""
id BIGINT its number
message_id BIGINT the reply
step_index INTEGER its number in the reply, from 0
position INTEGER its place in all that the model saw
token_id INTEGER the token
token VARCHAR the token's text
is_special BOOLEAN whether it is one of the model's control tokens
token_class VARCHAR new word, rest of a word, number, punctuation, space or special
logit DOUBLE the model's own
prob DOUBLE the model's own, before sampling
logprob DOUBLE its logarithm, in nats
entropy DOUBLE of the model's distribution, in nats
rank INTEGER 1: the most likely
margin DOUBLE prob of rank 1 less that of rank 2
sampled_prob DOUBLE prob after the sampling settings
greedy_id INTEGER what would have been said without a draw
elapsed_ms DOUBLE time of the step
settle_layer INTEGER first layer from which the token stays on top; NULL: it never does
settle_prob DOUBLE the token's prob at that layer
layers INTEGER the last layer of its lens; NULL: no lens
other_id INTEGER the most likely token that was not said
other_token VARCHAR its text
other_prob DOUBLE its prob
"""),
    ),
    Table(
        "topk_entry",
        "a candidate for a step's token",
        _columns(
            _OF_STEP
            + """
rank INTEGER 1: the most likely
token_id INTEGER the token
token VARCHAR its text
logit DOUBLE the model's own
prob FLOAT the model's own
sampled_prob FLOAT after the sampling settings
"""
        ),
    ),
    Table(
        "lens_layer",
        "what the Logit Lens says of a layer at a step",
        _columns(
            _OF_STEP
            + """
layer INTEGER 0: the embedding; the last: the model's own distribution
entropy FLOAT of the layer's distribution, in nats
chosen_rank INTEGER the rank of the token that was said
chosen_prob FLOAT its prob
kl FLOAT KL(model's own distribution ‖ this layer's), in nats
top_id INTEGER the layer's own first token
top_token VARCHAR its text
top_prob FLOAT its prob
"""
        ),
    ),
    Table(
        "lens_entry",
        "a token that the Logit Lens reads at a layer",
        _columns(
            _OF_STEP
            + """
layer INTEGER the layer
rank INTEGER 1: the most likely
token_id INTEGER the token
token VARCHAR its text
logit FLOAT the layer's
prob FLOAT the layer's
"""
        ),
    ),
    Table(
        "attention_layer",
        "how a layer's attention is shared out at a step, heads averaged",
        _columns(
            _OF_STEP
            + """
layer INTEGER the layer
is_evidence BOOLEAN whether it is the last layer that has attention
first_token FLOAT on position 0, whatever it is
system FLOAT on the system message
user FLOAT on what the user said
assistant FLOAT on earlier replies
template FLOAT on the chat template around them
reply FLOAT on this reply's own tokens
rest FLOAT on positions below the kept ones
missing FLOAT on no position: a learned sink
"""
        ),
    ),
    Table(
        "attention_entry",
        "a position that a layer looked at, heads averaged",
        _columns(
            _OF_STEP
            + """
layer INTEGER the layer
rank INTEGER 1: the most attended
position INTEGER the position
weight FLOAT its weight
"""
        ),
    ),
    Table(
        "prompt_token",
        "a token of what a reply's model was given",
        _columns("""
message_id BIGINT the reply
position INTEGER its place, from 0
token_id INTEGER the token
token VARCHAR its text
segment VARCHAR template, system, user, assistant, thinking, tool_call or tool
"""),
    ),
)

BY_NAME = {table.name: table for table in TABLES}

_AT_STEP = {"message_id": "BIGINT", "step_index": "BIGINT"}

# They read the full tensors, which no table holds. What is not there gives NULL.
FUNCTIONS: tuple[Function, ...] = (
    Function(
        "distance",
        {**_AT_STEP, "other_message_id": "BIGINT", "other_step_index": "BIGINT"},
        "STRUCT(kl DOUBLE, kl_reverse DOUBLE, js DOUBLE, tv DOUBLE, shared INTEGER, "
        "top_rank INTEGER, basis VARCHAR)",
        "how far two steps' distributions are apart: from the full logits where both kept them, "
        "from the candidates where not, as basis says",
    ),
    Function(
        "token_rank",
        {**_AT_STEP, "token_id": "BIGINT"},
        "STRUCT(prob DOUBLE, rank INTEGER)",
        "any token's probability and rank at a step, from the full logits",
    ),
    Function(
        "head_shares",
        _AT_STEP,
        "STRUCT(layer INTEGER, head INTEGER, shares DOUBLE[], focus DOUBLE)[]",
        "what each head gives to "
        + ", ".join(f"{i} {thing}" for i, thing in enumerate(HEAD_TARGETS, start=1))
        + "; focus is its largest weight",
    ),
    Function(
        "keeps",
        {"message_id": "BIGINT", "tensor": "VARCHAR"},
        "BOOLEAN",
        "whether a reply kept its full logits, hidden_states or attentions",
    ),
)
