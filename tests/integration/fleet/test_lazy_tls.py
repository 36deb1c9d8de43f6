"""TLS of aiohttp: certificate authorities are read at the first TLS connection, not at import."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from pathlib import Path

import pytest

from fanfold.tests.support.certificates import make_certificate

pytestmark = pytest.mark.integration

ASK = """if True:
    import asyncio, gc, ssl, sys
    import fanfold.graphs.worker
    from fanfold.backends.core.connection_errors import describe_connection_error
    from fanfold.backends.core.lazy_tls import aiohttp
    from fanfold.backends.fleet.policy import FleetPolicy
    from fanfold.backends.fleet.transport import Transport

    def count():
        found = [one for one in gc.get_objects() if isinstance(one, ssl.SSLContext)]
        return sorted(one.cert_store_stats()["x509"] for one in found)

    async def ask(url):
        transport = Transport(FleetPolicy())
        try:
            answer = await transport.get(url, {}, 20.0)
            print(answer.status)
        except aiohttp.ClientConnectorCertificateError as error:
            print(describe_connection_error(error))
        await transport.aclose()

    print(count())
    asyncio.run(ask(sys.argv[1]))
    print(count())
    print(ssl.create_default_context().cert_store_stats()["x509"])
"""


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
    writer.close()
    await writer.wait_closed()


async def ask(folder: Path, authorities: Path) -> list[str]:
    """Ask an HTTPS server from a new process; return the lines that the process prints."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder))
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/models"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            ASK,
            url,
            env=os.environ
            | {"SSL_CERT_FILE": str(authorities), "SSL_CERT_DIR": str(folder / "no")},
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
    return out.decode().splitlines()


async def test_authorities_are_read_at_the_first_connection(tmp_path: Path) -> None:
    before, status, after, fresh = await ask(tmp_path, tmp_path / "server.pem")
    assert set(json.loads(before)) == {0}  # aiohttp's contexts are among them
    assert status == "200"
    assert 1 in json.loads(after)
    assert fresh == "1"  # other contexts read them when they are made


async def test_a_server_of_an_unknown_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_certificate(tmp_path / "other")
    _, refused, _, _ = await ask(tmp_path, other)
    assert "certificate" in refused
