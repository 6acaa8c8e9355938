"""A conversation as one HTML file that needs nothing else and asks for nothing.

The guarantees: it opens from a disk without a network and makes no request,
which its own content security policy holds too; what a model or a user wrote is
data and never markup; everything shown is in the file.
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
from oki_trace.exchange.selection import selected
from oki_trace.reporting import Progress
from oki_trace.store.reading.reader import TraceReader


def write_report(
    reader: TraceReader,
    conversation_id: int,
    file: TextIO,
    message_id: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the report of a conversation, or of one of its replies. Raises NotFound."""
    with selected(reader, conversation_id, message_id) as chosen:
        data = payload(chosen, progress)
    style, script = _part("report.css"), _part("report.js")
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
    # In one pass, so that no part is looked into for the name of another.
    file.write(re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html")))


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What names an inline part in a content security policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _inert(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
