"""The arguments and tools that a chat template accepts besides the messages."""

from __future__ import annotations

import re
from typing import Any

from oki_trace.errors import CaptureError
from oki_trace.llm.chat.markers import template_text
from oki_trace.records import TemplateOptions

# Passed to every template, or defined in its environment.
_BUILT_IN = {
    *("messages", "tools", "bos_token", "eos_token", "add_generation_prompt"),
    *("raise_exception", "strftime_now"),
}


def refuse_unknown(tokenizer: Any, options: TemplateOptions) -> None:
    """Raise CaptureError if the template would ignore one of the options.

    Jinja accepts any name, so a misspelt argument would have no effect and give no error.
    """
    if not options:
        return
    text = template_text(tokenizer)
    if not text:
        raise CaptureError(
            "The model has no chat template, so it accepts no tools and no template "
            "arguments. Leave them out."
        )
    if options.tools and not _reads(text, "tools"):
        raise CaptureError(
            "The model's chat template accepts no tools. Leave out --tools, or choose a model that "
            "was trained with tools."
        )
    for name in options.arguments:
        if not _reads(text, name):
            known = ", ".join(_arguments_of(text)) or "none"
            raise CaptureError(
                f"The model's chat template has no argument {name}. It reads {known}. "
                f"{name}=null removes an argument of an earlier turn."
            )


def _reads(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", text) is not None


def _arguments_of(text: str) -> list[str]:
    """The names that a template reads and does not set; empty if it cannot be parsed."""
    from jinja2 import Environment, TemplateError, meta

    # A tag of transformers, which marks the model's own text.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        names = meta.find_undeclared_variables(parsed) - _BUILT_IN
    except (TemplateError, RecursionError):
        return []
    return sorted(name for name in names if not name.endswith("_token"))
