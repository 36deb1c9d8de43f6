"""A real endpoint manager (`globus-compute-endpoint start`), which starts user endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .processes import kill_process, offspring
from .service import GlobusService

START_S = 60.0
NAME = "site"
PROGRAM = Path(sys.executable).parent / "globus-compute-endpoint"


@dataclass(frozen=True, slots=True)
class Manager:
    """A running manager; its endpoints have process sessions of their own."""

    endpoint_id: str
    process: subprocess.Popen[bytes]
    home: Path

    def kill(self) -> None:
        """SIGKILL it and all that it has started."""
        family = [self.process.pid, *offspring(self.process.pid)]
        for pid in family:
            kill_process(pid)
        self.process.wait(10)

    def user_endpoints(self) -> list[Path]:
        """Return the folders of the user endpoints that it has started."""
        return sorted(self.home.glob("uep.*"))

    def logs(self, size: int = 3000) -> str:
        """Return the ends of its log and of its user endpoints', `size` characters of each."""
        files = [self.home / "std.log", *self.home.glob("*/endpoint.log")]
        return "\n".join(f"{f}\n{f.read_text(errors='replace')[-size:]}" for f in files)


def configure(home: Path, template: str, schema: str) -> None:
    """Make a manager's folder as its program does, with a template and its schema."""
    _run(home, "configure", NAME, "--multi-user", "false", "--contact-email", "me@localhost")
    folder = home / NAME
    (folder / "user_config_template.yaml.j2").write_text(template)
    (folder / "user_config_schema.json").write_text(schema)
    (folder / "config.yaml").write_text("email: nobody@localhost\nheartbeat_period: 5\n")
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    # as root, a manager gives user endpoints nothing of its own environment
    environment = kept | {"HOME": str(home), "GLOBUS_COMPUTE_USER_DIR": str(home)}
    (folder / "user_environment.yaml").write_text(json.dumps(environment))


def start_manager(service: GlobusService, home: Path) -> Manager:
    """Start the manager that `configure` made, and wait for its first heartbeat.

    It takes the service's address from a list that has one of this machine, with a fixed port.
    The service is therefore its HTTP proxy.

    Raises:
        RuntimeError: It ended or did not come up in time; its log is in the text.
    """
    environment = {
        "GLOBUS_SDK_ENVIRONMENT": "local",
        "GLOBUS_SDK_SERVICE_URL_AUTH": f"{service.url}/",
        "GLOBUS_COMPUTE_CLIENT_ID": "22222222-2222-4333-8444-555555555555",
        "GLOBUS_COMPUTE_CLIENT_SECRET": "stand-in",
        "http_proxy": service.url,
        "no_proxy": "127.0.0.1",
    }
    with (home / "std.log").open("ab") as log:
        process = subprocess.Popen(
            [PROGRAM, "start", NAME],
            env=_environment(home, environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record, deadline = home / NAME / "endpoint.json", time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if record.exists() and record.stat().st_size:
            manager = Manager(json.loads(record.read_text())["endpoint_id"], process, home)
            if service.online(manager.endpoint_id):
                return manager
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the manager did not come up:\n{(home / 'std.log').read_text()}")


def _run(home: Path, *arguments: str) -> None:
    subprocess.run(
        [PROGRAM, *arguments],
        env=_environment(home, {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=START_S,
    )


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    scripts = f"{PROGRAM.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **more, "PATH": scripts, "GLOBUS_COMPUTE_USER_DIR": str(home.resolve())}
