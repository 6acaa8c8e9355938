"""Makes the server answer only its own pages, under its own host names, and in no frame.

Another site, open in the same browser, may point its name at this machine (DNS
rebinding), connect from another port of this machine, or frame the explorer. The
server has to refuse: whoever reaches it can read and delete everything.
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

# In place of names: every IP address, and the host names of this machine. Any other
# name has to be listed: it could be one that was pointed here (DNS rebinding).
ANY = "*"
# The ports that a browser leaves out.
_DEFAULT_PORTS = (":80", ":443")

_REFUSED = {
    "host": b"The explorer is not served under this name. If it is yours, start the explorer "
    b"with --allow-host and the name.\n",
    "origin": b"Pages of other sites cannot use the explorer.\n",
}


class Guard:
    """Middleware around Streamlit that refuses requests which no page of ours sent.

    HTTP gets status 403 and a sentence; a WebSocket is closed before it opens,
    which is a 403 as well.
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
        # Read at the first request: the options are parsed after this object is created.
        return tuple(st.get_option("server.allowedHosts") or ())


def refusal(host: str | None, origins: Iterable[str], names: Iterable[str]) -> str | None:
    """Why a request is refused, "host" or "origin"; None if it is answered.

    ``host`` is its Host header, ``origins`` its Origin headers, ``names`` the host names
    of the explorer. A request of a page without an Origin header is a navigation or an
    image, whose response the page cannot read.
    """
    name = hostname(host)
    if host is None or name is None or not is_ours(name, names):
        return "host"
    for origin in origins:
        same = _host_and_port(origin) == _host_and_port(f"//{host}")
        if urlsplit(origin).scheme not in ("http", "https") or not same:
            return "origin"
    return None


def is_ours(name: str, names: Iterable[str]) -> bool:
    """Whether ``name``, from a Host header, is one of ``names``, which may contain ``ANY``."""
    known = {one.strip().lower().strip("[]").rstrip(".") for one in names}
    if name in known:
        return True
    return ANY in known and (_is_address(name) or name in own_names())


def own_names() -> frozenset[str]:
    """The host names of this machine, without asking a name server, which might be remote."""
    name = socket.gethostname().lower().rstrip(".")
    short = name.partition(".")[0]
    return frozenset({"localhost", name, short, f"{short}.local"})


def hostname(host: str | None) -> str | None:
    """The name or address in a Host header, in lower case; None if the header is malformed."""
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
    """The headers of every response: no frame, no content from other origins, no referrer."""
    policy = {
        "default-src": "'self'",
        # Vega compiles charts in the browser, and Streamlit loads components from text.
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


def origins(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The Origin headers of a request."""
    return [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]


def only(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The header ``name``; None if it is absent or repeated."""
    values = [value for one, value in headers if one.lower() == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _host_and_port(url: str) -> str:
    netloc = urlsplit(url).netloc.lower()
    return next((netloc.removesuffix(p) for p in _DEFAULT_PORTS if netloc.endswith(p)), netloc)


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
