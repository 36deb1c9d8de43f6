"""A fabricated login with the facility's real tool, and a local service that renews tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from alcf_tokens.auth import APP_NAME, AUTH_CLIENT_ID, SERVICES, ServiceName
from globus_sdk.token_storage import JSONTokenStorage, TokenStorageData

INFERENCE = SERVICES[ServiceName.inference]


def store_login(home: Path, token: str, left_s: float = 3600.0) -> Path:
    """Write the token store of a user who has logged in."""
    file = home / ".globus" / "app" / AUTH_CLIENT_ID / APP_NAME / "tokens.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    data = TokenStorageData(
        resource_server=INFERENCE.resource_server,
        identity_id="ae341a98-d274-11e5-b888-dbae3a8ba545",
        scope=INFERENCE.scope,
        access_token=token,
        refresh_token="refresh-secret",
        expires_at_seconds=int(time.time() + left_s),
        token_type="Bearer",
    )
    storage = JSONTokenStorage(file)
    storage.store_token_data_by_resource_server({INFERENCE.resource_server: data})
    storage.close()
    return file


@dataclass
class Renewals:
    """The service that renews tokens."""

    tokens: list[str] = field(default_factory=list)
    asked: int = 0


@asynccontextmanager
async def serve_renewals(monkeypatch: pytest.MonkeyPatch, *tokens: str) -> AsyncIterator[Renewals]:
    """Serve new tokens where the SDK looks for Globus Auth; without any, refuse."""
    renewals = Renewals(list(tokens))

    async def renew(request: web.Request) -> web.Response:
        form = await request.post()
        assert form["refresh_token"] == "refresh-secret"
        renewals.asked += 1
        if not renewals.tokens:
            return web.json_response({"error": "invalid_grant"}, status=400)
        return web.json_response(
            {
                "access_token": renewals.tokens.pop(0),
                "refresh_token": "refresh-secret",
                "expires_in": 3600,
                "resource_server": INFERENCE.resource_server,
                "scope": INFERENCE.scope,
                "token_type": "Bearer",
                "other_tokens": [],
            }
        )

    app = web.Application()
    app.router.add_post("/v2/oauth2/token", renew)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        monkeypatch.setenv("GLOBUS_SDK_SERVICE_URL_AUTH", f"{site.name}/")
        yield renewals
    finally:
        await runner.cleanup()
