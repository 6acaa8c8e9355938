"""What the explorer's server answers to: its own pages, under its own names, in no frame.

A page of somebody else, open in the same browser, may lend its own name to this
machine's address (DNS rebinding), open a connection from another port of this
machine, or show the explorer in a frame. The server itself has to refuse: whoever
reaches it can read and delete everything.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import streamlit as st

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Instead of names: every address, and the names that this machine gives itself. A name
# of others' would have to be named: it could be one that was made to lead here.
ANY = "*"
# The ports that a browser leaves out.
_USUAL_PORTS = (":80", ":443")

_REFUSED = {
    "host": b"The explorer is not served under this name. If it is yours, start the explorer "
    b"with --allow-host and the name.\n",
    "origin": b"Another page cannot use the explorer.\n",
}


class Guard:
    """Middleware around Streamlit: refuses what is not asked by a page of ours.

    HTTP gets status 403 and a sentence; a WebSocket is closed before it opens,
    which is a 403 too.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        host = only(scope["headers"], b"host")
        why = refusal(host, origins(scope["headers"]), self._names)
        if why is not None:
            await _refuse(scope, send, why)
        elif scope["type"] == "http":
            assert host is not None
            await self._app(scope, receive, _with_headers(send, headers(host)))
        else:
            await self._app(scope, receive, send)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        # Known with the first request: the options are read after this was made.
        return tuple(st.get_option("server.allowedHosts") or ())


def refusal(host: str | None, origins: Iterable[str], names: Iterable[str]) -> str | None:
    """Why a request is not answered, "host" or "origin"; None: it is.

    ``host`` is its Host header, ``origins`` its Origin headers, ``names`` what the
    explorer may be called. Without an Origin no page of a browser sent it, but for
    one that asks for a document or a picture and can read neither.
    """
    name = hostname(host)
    if host is None or name is None or not is_ours(name, names):
        return "host"
    for origin in origins:
        if urlsplit(origin).scheme not in ("http", "https") or _place(origin) != _place(
            f"//{host}"
        ):
            return "origin"
    return None


def is_ours(name: str, names: Iterable[str]) -> bool:
    """Whether ``name``, of a Host header, is one of ``names``, which may be ``ANY``."""
    known = {one.strip().lower().strip("[]").rstrip(".") for one in names}
    if name in known:
        return True
    return ANY in known and (_is_address(name) or name in own_names())


def own_names() -> frozenset[str]:
    """The names that this machine gives itself. Asks no name server, which might be elsewhere."""
    name = socket.gethostname().lower().rstrip(".")
    short = name.partition(".")[0]
    return frozenset({"localhost", name, short, f"{short}.local"})


def hostname(host: str | None) -> str | None:
    """The name or address in a Host header, in lower case; None where it is neither."""
    if not host:
        return None
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.netloc != host or "@" in host:
        return None
    name = name.rstrip(".")
    letters = all(c.isascii() and (c.isalnum() or c in "-._") for c in name)
    return name if name and (letters or _is_address(name)) else None


def headers(host: str) -> dict[bytes, bytes]:
    """What every answer says to the browser: no frame, nothing from elsewhere, nothing sent."""
    policy = {
        "default-src": "'self'",
        # Charts are compiled in the browser, and the explorer's own elements come as text.
        "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob: data:",
        "style-src": "'self' 'unsafe-inline' blob: data:",
        "img-src": "'self' blob: data:",
        "font-src": "'self' data:",
        "media-src": "'self' blob: data:",
        "worker-src": "'self' blob:",
        # Not every browser counts a WebSocket as 'self'.
        "connect-src": f"'self' ws://{host} wss://{host} blob: data:",
        "object-src": "'none'",
        "base-uri": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return {
        b"content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items()).encode(),
        b"x-frame-options": b"DENY",
        b"x-content-type-options": b"nosniff",
        b"referrer-policy": b"no-referrer",
        b"cross-origin-resource-policy": b"same-origin",
    }


def origins(found: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The Origin headers of a request."""
    return [value.decode("latin-1") for name, value in found if name.lower() == b"origin"]


def only(found: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The header ``name``; None where it is absent, or there more than once."""
    values = [value for one, value in found if one.lower() == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _place(address: str) -> str:
    place = urlsplit(address).netloc.lower()
    return next((place.removesuffix(port) for port in _USUAL_PORTS if place.endswith(port)), place)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send, ours: dict[bytes, bytes]) -> Send:
    async def sent(message: Scope) -> None:
        if message["type"] == "http.response.start":
            theirs = [(n, v) for n, v in message.get("headers", ()) if n.lower() not in ours]
            message = {**message, "headers": [*theirs, *ours.items()]}
        await send(message)

    return sent


async def _refuse(scope: Scope, send: Send, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    fixed = {
        b"content-type": b"text/plain; charset=utf-8",
        b"x-content-type-options": b"nosniff",
        b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
        b"x-frame-options": b"DENY",
        b"content-length": str(len(_REFUSED[why])).encode(),
    }
    await send({"type": "http.response.start", "status": 403, "headers": [*fixed.items()]})
    await send({"type": "http.response.body", "body": _REFUSED[why]})
