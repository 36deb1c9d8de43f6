"""Network errors in plain words, without the terms of Python and its libraries."""

from __future__ import annotations

import errno
import socket
from typing import Final

from .lazy_tls import aiohttp

_REASONS: Final = {
    errno.ECONNREFUSED: "the connection was refused: no server listens on that port",
    errno.EHOSTUNREACH: "there is no route to the host",
    errno.ENETUNREACH: "there is no route to the network",
    errno.ECONNRESET: "the connection was closed by the other side",
    errno.EPIPE: "the connection was closed by the other side",
    errno.ETIMEDOUT: "no connection in time",
}


def describe_connection_error(error: Exception) -> str:  # noqa: PLR0911 - a table
    """Return why a request failed, as a clause for a message.

    Args:
        error: An error of aiohttp or the system, or ``TimeoutError``.
    """
    match error:
        case aiohttp.ConnectionTimeoutError():
            return "no connection in time"
        case TimeoutError():
            return "no answer in time"
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", error.certificate_error)
            return f"the certificate of the server is not accepted: {reason}"
        case aiohttp.ClientSSLError():
            return "the server does not speak TLS as expected (is the address http:// or https://?)"
        case aiohttp.ClientConnectorError(os_error=socket.gaierror() as cause):
            return f"the name of the host is unknown ({cause.strerror})"
        case aiohttp.ClientConnectorError(os_error=cause):
            return _REASONS.get(cause.errno or 0) or cause.strerror or str(cause)
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed before an answer"
        case aiohttp.ClientResponseError(status=status) if status == 400:  # noqa: PLR2004 - aiohttp's parser
            return "the answer is not valid HTTP (is this the port of another service?)"
        case OSError(errno=int() as number):
            return _REASONS.get(number) or error.strerror or str(error)
        case _:
            return " ".join(str(error).split()) or type(error).__name__
