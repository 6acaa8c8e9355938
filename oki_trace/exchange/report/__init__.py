"""A conversation as one self-contained HTML file.

The file opens without a network and makes no request; its content security policy
forbids any. Text from a model or a user is data and never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import TextIO

from oki_trace.exchange.report.payload import payload
from oki_trace.exchange.selection import Selection

# One script, in this order.
_SCRIPTS = ("talk.js", "step.js", "map.js", "open.js")


def write_report(chosen: Selection, file: TextIO) -> None:
    """Write the report of a conversation, or of one of its replies."""
    data = payload(chosen)
    style, script = _part("report.css"), "".join(map(_part, _SCRIPTS))
    parts = {
        "policy": html.escape(
            "default-src 'none'; base-uri 'none'; form-action 'none'; "
            f"style-src {_source(style)}; script-src {_source(script)}"
        ),
        "title": html.escape(str(data["title"])),
        "style": style,
        "script": script,
        "data": _inert(json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))),
    }
    # In one pass: a part that contains the name of another is not expanded again.
    file.write(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html")))


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """The source of an inline part, for the content security policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _inert(text: str) -> str:
    """JSON that cannot end its HTML element."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
