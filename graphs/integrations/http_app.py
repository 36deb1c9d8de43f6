"""The ``http.app`` of LangGraph's server: checks the host and origin of every HTTP request.

A web page in a browser can send requests to a server on loopback, and can read the answers once its
host name resolves to 127.0.0.1 (DNS rebinding). CORS does not prevent the sending. So a request
must name a host of this server, and its origin, if any, must be one that ``http.cors`` of
``langgraph.json`` allows.
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
"""Variable with the comma-separated host names of this server; loopback is always allowed."""

_SERVER: Final = "LANGGRAPH_HTTP"
"""Variable in which LangGraph's server keeps the section ``http`` of langgraph.json."""

_OWN: Final = "/noauth"
"""Root path of the server's requests to itself; external requests cannot have one."""

_POLICY_VIOLATION: Final = 1008


class SourceMiddleware:
    """Refuses requests that name another host or come from a page of another site.

    Args:
        app: The application that serves the other requests.
        environment: Environment variables with the settings.
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
                    "the request names a host that is not this server's; list the host names of "
                    f"the server in {HOSTS_ENV}, separated by commas"
                )
        for origin in headers.getlist("origin"):
            if not self._is_allowed_origin(origin):
                return (
                    "the request comes from a page of a site that is not allowed; list the site in "
                    "http.cors.allow_origins of langgraph.json"
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
    """Return the error of a request that fanfold refuses."""
    return JSONResponse({"detail": str(error)}, status_code=422)


app = Starlette(
    middleware=[Middleware(SourceMiddleware)], exception_handlers={FanfoldError: respond_with_error}
)
"""The ``http.app`` of ``langgraph.json``."""
