"""Clients of the run's own HTTP exchange; requires the extra ``academy``."""

from __future__ import annotations

from typing import Any

from academy.exchange import HttpExchangeFactory
from academy.exchange.cloud.client import HttpExchangeTransport

from ...core.lazy_tls import aiohttp


class OwnTransport(HttpExchangeTransport):
    """A client that reads no settings from the environment.

    Academy's client reads ``.netrc``, whose entries replace the token, and sends the token to
    proxies.
    """

    @classmethod
    def create_session(cls, connection_info: Any) -> aiohttp.ClientSession:
        """Return a session that sends the token to the exchange only."""
        return aiohttp.ClientSession(
            headers=connection_info.additional_headers,
            timeout=connection_info.client_timeout,
            trust_env=False,
        )

    def factory(self) -> OwnExchangeFactory:
        """Return a factory for further clients."""
        info = self._info
        return OwnExchangeFactory(info.url, additional_headers=info.additional_headers)


class OwnExchangeFactory(HttpExchangeFactory):
    """Make clients of the run's own exchange, here and on workers."""

    async def _create_transport(
        self, mailbox_id: Any = None, *, name: str | None = None, registration: Any = None
    ) -> OwnTransport:
        del registration  # an HTTP exchange needs none
        return await OwnTransport.new(
            connection_info=self._info,
            mailbox_id=mailbox_id,
            name=name,
            auth_method=self._auth_method,
        )
