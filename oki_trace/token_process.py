"""A process that splits a text into tokens: the explorer runs it, which loads no tokenizer itself.

Input: ``{"model": …, "text": …}`` as JSON. Output: ``[[id, text], …]``, or ``{"error": …}``.
"""

from __future__ import annotations

import json
import sys

from oki_trace.errors import OkiTraceError


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    try:
        answer: object = tokens(request["model"], request["text"])
    except OkiTraceError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))


def tokens(model_id: str, text: str) -> list[tuple[int, str]]:
    """The tokens of a typed text, in the vocabulary of a model. Raises OkiTraceError."""
    from oki_trace.llm.capture.vocabulary import Vocabulary
    from oki_trace.llm.chat.typed_text import typed_ids
    from oki_trace.llm.loading.load import load_tokenizer

    tokenizer = load_tokenizer(model_id)
    vocabulary = Vocabulary(tokenizer)
    return [(number, vocabulary.text(number)) for number in typed_ids(tokenizer, text)]
