"""A real endpoint agent (`globus-compute-endpoint`) for the stand-in service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .processes import kill_session, session
from .service import GlobusService

START_S = 120.0
THREADS = """
engine: {type: ThreadPoolEngine, max_workers: 2}
heartbeat_period: 5
"""
HTEX = """
engine:
  type: GlobusComputeEngine
  address: 127.0.0.1
  encrypted: false
  max_workers_per_node: 2
  provider: {type: LocalProvider, init_blocks: 1, min_blocks: 1, max_blocks: 1}
heartbeat_period: 5
"""


@dataclass(frozen=True, slots=True)
class UserEndpoint:
    """A running user endpoint: the agent's process and the workers in its session."""

    endpoint_id: str
    process: subprocess.Popen[bytes]
    directory: Path

    def stop(self, timeout_s: float = 20.0) -> None:
        """End the agent by SIGTERM; after `timeout_s` seconds, and for its workers, by SIGKILL."""
        if self.process.poll() is None:
            self.process.terminate()
            self.unpause()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.kill()

    def kill(self) -> None:
        """SIGKILL the agent and all its workers at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        kill_session(self.process.pid)

    def pause(self) -> None:
        """SIGSTOP the agent and its workers: the service goes on taking tasks for it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGSTOP)

    def unpause(self) -> None:
        """SIGCONT the agent and its workers."""
        for pid in self.processes():
            os.kill(pid, signal.SIGCONT)

    def processes(self) -> list[int]:
        """Return the processes of the agent and its workers that live."""
        return session(self.process.pid)

    def logs(self, size: int = 3000) -> str:
        """Return the ends of the agent's logs, `size` characters of each."""
        files = [self.directory / "std.log", self.directory / "endpoint.log"]
        return "\n".join(f.read_text(errors="replace")[-size:] for f in files if f.exists())


def start_user_endpoint(
    service: GlobusService,
    home: Path,
    config: str = THREADS,
    *,
    endpoint_id: str | None = None,
    env: Mapping[str, str] | None = None,
) -> UserEndpoint:
    """Start a real user endpoint and wait for its first heartbeat.

    Args:
        service: The service whose tasks it will run.
        home: Becomes the agent's `GLOBUS_COMPUTE_USER_DIR`.
        config: The agent's configuration, as YAML text with an `engine`.
        endpoint_id: That of an endpoint that ended, to go on with its task queue.
        env: Environment variables besides those of this process.

    Raises:
        RuntimeError: The agent ended or did not come up in time; its logs are in the text.
    """
    endpoint_id = endpoint_id or str(uuid.uuid4())
    credentials = service.credentials(endpoint_id)
    service.forget_heartbeat(endpoint_id)
    directory = home / f"uep-{endpoint_id[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "daemon.pid").unlink(missing_ok=True)  # of a killed agent
    message = {"amqp_creds": credentials, "config": config, "ep_info": {}}
    process = _launch(directory, json.dumps(message).encode(), env or {})
    endpoint = UserEndpoint(endpoint_id, process, directory)
    _wait_online(service, endpoint)
    return endpoint


def _launch(directory: Path, message: bytes, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        **env,
        "GLOBUS_COMPUTE_USER_DIR": str(directory.parent.resolve()),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",  # HTEX starts its own scripts
    }
    with (directory / "std.log").open("ab") as log:
        process = subprocess.Popen(
            [scripts / "globus-compute-endpoint", "_start-user-endpoint", directory.name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(message)
    return process


def _wait_online(service: GlobusService, endpoint: UserEndpoint) -> None:
    deadline = time.monotonic() + START_S
    while not service.online(endpoint.endpoint_id):
        if endpoint.process.poll() is not None or time.monotonic() > deadline:
            endpoint.kill()
            raise RuntimeError(f"the endpoint did not come up:\n{endpoint.logs()}")
        time.sleep(0.05)
