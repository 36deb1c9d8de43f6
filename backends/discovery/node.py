"""From settings to the plan of a node's servers."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ...configs.models import RunConfig
from ...configs.node import NAMES
from ..core.errors import ConfigurationError
from ..core.secrets import MASKED
from ..core.templates import names_of, split_command
from ..servers.plan import NodePlan, accelerator_ids, server_plans
from ..simulated.process import MODULE
from .resolve import endpoints_key

HOST: Final = ("FANFOLD_HOST", "SLURMD_NODENAME")
"""Variables that name the node; the system is asked where none is set."""
NODES: Final = "FANFOLD_NODES"
"""Variable of a job's coordinator: how many nodes serve."""
_ADDRESS: Final = re.compile(r"[\d.]+|.*:.*")


def this_host(environment: Mapping[str, str] | None = None) -> str:
    """Return this node's name."""
    environment = os.environ if environment is None else environment
    return next((environment[name] for name in HOST if environment.get(name)), socket.gethostname())


def short_name(host: str) -> str:
    """Return a host's name without its domain, in small letters; an address as it is."""
    return host if _ADDRESS.fullmatch(host) else host.lower().partition(".")[0]


def starts_servers(config: RunConfig) -> bool:
    """Say whether fanfold starts the model servers.

    It does not where somebody else has: Aegis, by its registry or its endpoints file, a gateway, a
    simulated fleet, or what ``auto`` finds.
    """
    endpoints = config.endpoints
    if config.node.serve is None:
        return False
    if endpoints.file is not None:
        return not Path(endpoints.file).is_file()  # a folder is the servers folder
    return endpoints.hosts is not None or endpoints.urls is not None


def most_servers(config: RunConfig, environment: Mapping[str, str]) -> int | None:
    """Return how many servers of a job can be ready in the end; blocks.

    None where nobody says how many nodes the job has, or it does not serve.

    Args:
        config: The settings.
        environment: Variables of the coordinator.
    """
    nodes = environment.get(NODES, "")
    if not nodes.isdigit() or config.endpoints.file is None or not starts_servers(config):
        return None
    failed = sum(1 for _ in (Path(config.endpoints.file) / "logs").glob("*.failed"))
    return max(0, int(nodes) - failed) * config.node.instances


def serves_simulated(config: RunConfig) -> bool:
    """Say whether the command serves a simulated fleet, whose answers mean nothing."""
    return config.node.serve is not None and MODULE in shlex.split(config.node.serve)


def node_plan(
    config: RunConfig,
    folder: Path,
    host: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> NodePlan:
    """Return what is to be served on this node.

    Args:
        config: The settings.
        folder: The servers folder.
        host: The node's name; asked of the environment by default.
        environment: Variables; the process's own by default.

    Raises:
        ConfigurationError: Something is missing, or does not fit this node.
    """
    environment = os.environ if environment is None else environment
    node, host = config.node, host or this_host(environment)
    if node.serve is None:
        msg = "set node.serve: the command that serves the model, e.g. vllm serve … --port {port}"
        raise ConfigurationError(msg)
    if MASKED in node.serve:
        msg = (
            "node.serve: a run folder does not keep a secret that was written out; write it as "
            "${VAR} and set the variable on the nodes"
        )
        raise ConfigurationError(msg)
    words = split_command(node.serve, NAMES)
    told = node.accelerators
    ids = accelerator_ids(told.variable, told.ids, told.count, environment)
    named = names_of(words)
    if "model" in named and config.model.name is None:
        raise ConfigurationError("node.serve names {model}: set model.name")
    if "gpus" in named and not ids:
        raise ConfigurationError("node.serve names {gpus}: set node.accelerators")
    for name, value in node.env.items():
        if value == MASKED:
            msg = (
                f"node.env.{name}: a run folder does not keep a secret that was written out; give "
                f"it by a variable: --set 'node.env.{name}=${{VAR}}'"
            )
            raise ConfigurationError(msg)
    key = endpoints_key(config.endpoints)
    return NodePlan(
        host=short_name(host),
        address=node.address.replace("{host}", host),
        folder=str(folder.absolute()),
        servers=server_plans(
            words,
            ports=node.ports,
            instances=node.instances,
            variable=told.variable,
            ids=ids,
            env=node.env,
            model=config.model.name or "",
        ),
        ready=node.ready,
        timeout_s=node.timeout_s,
        restarts=node.restarts,
        linger_s=node.linger_s,
        key=None if key == "EMPTY" else key,
    )
