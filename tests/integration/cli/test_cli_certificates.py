"""A server whose certificate an unknown authority signed: refused, and accepted if it is named."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fanfold.tests.support.certificates import make_certificate

pytestmark = pytest.mark.integration

SETTINGS = """\
name: https
input: {dataset: molecules}
task: {prompt: "{smiles}"}
model: {name: m}
endpoints: {urls: ["https://127.0.0.1:PORT/v1"]}
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, _format: str, *_args: object) -> None:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a PEM file with a self-signed certificate for 127.0.0.1 and its key."""
    return make_certificate(tmp_path)


@pytest.fixture
def settings(certificate: Path, tmp_path: Path) -> Iterator[Path]:
    """Serve a list of models over TLS; return a configuration file that names the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    path = tmp_path / "https.yaml"
    path.write_text(SETTINGS.replace("PORT", str(server.server_port)))
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


def list_endpoints(settings: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    trusted = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    plain = {name: value for name, value in os.environ.items() if name not in trusted}
    return subprocess.run(
        [sys.executable, "-m", "fanfold", "endpoints", str(settings)],
        cwd=settings.parent,
        env=plain | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_authority_is_trusted_by_ssl_cert_file(settings: Path, certificate: Path) -> None:
    refused = list_endpoints(settings)
    assert refused.returncode == 2
    assert "the certificate of the server is not accepted" in refused.stderr
    accepted = list_endpoints(settings, SSL_CERT_FILE=str(certificate))
    assert (accepted.returncode, accepted.stderr) == (0, "")
