"""Makes the server answer only its own pages, under its own host names, and in no frame.

Another site, open in the same browser, may point its name at this machine (DNS
rebinding), connect from another port of this machine, or frame the explorer. The
server has to refuse: whoever reaches it can read and delete everything.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

import streamlit as st
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

# In place of names: every IP address, and the host names of this machine. Any other
# name has to be listed: it could be one that was pointed here (DNS rebinding).
ANY = "*"
# The ports that a browser leaves out.
_DEFAULT_PORTS = (":80", ":443")

_REFUSED = {
    "host": "The explorer is not served under this name. If the name is yours, start the "
    "explorer with --allow-host and the name.\n",
    "origin": "Pages of other sites cannot use the explorer.\n",
}
_REFUSED_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """Middleware around Streamlit that refuses requests which no page of ours sent.

    HTTP gets status 403 and a sentence; a WebSocket is closed before it opens,
    which is a 403 as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        received = Headers(scope=scope)
        hosts = received.getlist("host")
        host = hosts[0] if len(hosts) == 1 else None
        why = refusal(host, received.getlist("origin"), self._names)
        if scope["type"] == "http":
            if why is None:
                assert host is not None
                await self._app(scope, receive, _with_headers(send, headers(host)))
            else:
                response = PlainTextResponse(_REFUSED[why], 403, _REFUSED_HEADERS)
                await response(scope, receive, send)
        elif why is None:
            await self._app(scope, receive, send)
        else:
            await WebSocketClose(code=1008)(scope, receive, send)

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


def headers(host: str) -> dict[str, str]:
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
        "content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
        "x-frame-options": "DENY",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
    }


def _host_and_port(url: str) -> str:
    netloc = urlsplit(url).netloc.lower()
    return next((netloc.removesuffix(p) for p in _DEFAULT_PORTS if netloc.endswith(p)), netloc)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send, ours: Mapping[str, str]) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(ours)
        await send(message)

    return sent
