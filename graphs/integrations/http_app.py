"""What LangGraph's server asks of every HTTP request, whatever route it takes: ``http.app``.

A page of any site that is open in a browser can send requests to a server on loopback, and reads
the answers once its host's name points to 127.0.0.1. CORS does not keep it from sending. So a
request must name a host that is this server, and its origin, if it has one, must be one that
``http.cors`` of ``langgraph.json`` allows.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ...backends.core.errors import FanfoldError

HOSTS_ENV: Final = "FANFOLD_SERVER_HOSTS"
"""Variable with the names by which clients reach the server, commas between; loopback always is."""

_SERVER: Final = "LANGGRAPH_HTTP"
"""Where LangGraph's server keeps the section ``http`` of langgraph.json."""

_OWN: Final = "/noauth"
"""Root path of the server's requests to itself; no request from outside can have one."""

_POLICY_VIOLATION: Final = 1008


class SourceMiddleware:
    """Refuses requests that name another host, or come from the page of a foreign site.

    Args:
        app: What the other requests are for.
        environment: Where the settings are looked up.
    """

    def __init__(self, app: ASGIApp, environment: Mapping[str, str] | None = None) -> None:
        found = os.environ if environment is None else environment
        cors = (json.loads(found.get(_SERVER) or "{}") or {}).get("cors") or {}
        self._app = app
        self._hosts = {name.strip().lower() for name in found.get(HOSTS_ENV, "").split(",")} - {""}
        self._origins = set(cors.get("allow_origins", ()))
        self._pattern = re.compile(cors.get("allow_origin_regex") or "(?!)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        inside = str(scope.get("root_path", "")).split("/")[:2] == _OWN.split("/")
        outside = scope["type"] in ("http", "websocket") and not inside
        problem = self._find_problem(Headers(scope=scope)) if outside else None
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": problem})
        else:
            await JSONResponse({"detail": problem}, status_code=403)(scope, receive, send)

    def _find_problem(self, headers: Headers) -> str | None:
        for host in headers.getlist("host") or [""]:
            if not self._is_own_host(_hostname(f"//{host}")):
                return (
                    "the request names a host that is not this server's; list the names by which "
                    f"clients reach it in {HOSTS_ENV}, commas between"
                )
        for origin in headers.getlist("origin"):
            if not self._is_allowed_origin(origin):
                return (
                    "the request comes from the page of a site that this server does not serve; "
                    "list the site in http.cors.allow_origins of langgraph.json"
                )
        return None

    def _is_own_host(self, name: str | None) -> bool:
        if name is None:
            return False
        try:
            return ipaddress.ip_address(name).is_loopback or name in self._hosts
        except ValueError:
            return name == "localhost" or name in self._hosts

    def _is_allowed_origin(self, origin: str) -> bool:
        listed = origin in self._origins or self._pattern.fullmatch(origin) is not None
        return listed or (_hostname(origin) or "") in self._hosts


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def respond_with_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a request that fanfold refuses with the reason."""
    return JSONResponse({"detail": str(error)}, status_code=422)


app = Starlette(
    middleware=[Middleware(SourceMiddleware)], exception_handlers={FanfoldError: respond_with_error}
)
"""What ``langgraph.json`` names ``http.app``."""
