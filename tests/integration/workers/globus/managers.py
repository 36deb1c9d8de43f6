"""Managers of endpoints: commands to start user endpoints, one per set of options."""

from __future__ import annotations

import json
import threading
import uuid

from .broker import Broker
from .identity import USER
from .records import Json


class Managers:
    """Tells managers to start user endpoints, one per distinct options."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._children: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def queues(self, manager: str) -> Json:
        """Open the queue on which a manager waits for commands, and return what it needs."""
        queue = self._broker.open_commands(manager)
        return {"command_queue_info": {"connection_url": self._broker.url, "queue": queue}}

    def child(self, manager: str, body: Json) -> str:
        """Return the id of the user endpoint for a submission."""
        options = json.dumps(body.get("user_endpoint_config") or {}, sort_keys=True)
        with self._lock:
            return self._children.setdefault((manager, options), str(uuid.uuid4()))

    def start(self, manager: str, child: str, body: Json, credentials: Json) -> None:
        """Command a manager to start a user endpoint, or to go on with it where it runs."""
        command = {
            "command": "cmd_start_endpoint",
            "args": [],
            "kwargs": {
                "name": f"uep.{manager}.{child}",
                "user_opts": body.get("user_endpoint_config") or {},
                "user_runtime": body.get("user_runtime") or {},
                "amqp_creds": credentials,
            },
            "globus_effective_identity": USER["sub"],
            "globus_identity_set": [USER],
            "globus_username": USER["username"],
        }
        self._broker.send_command(manager, json.dumps(command).encode())
