"""Describe the servers of a node as plain values that can be sent to another process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import orjson

from ..core.errors import BackendError, ConfigurationError
from ..core.templates import fill_names

VERSION: Final = 1
"""Version of a plan's JSON."""

NO_VARIABLE: Final = "none"


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """How servers are monitored, in seconds.

    Attributes:
        every_s: Between two probes of a server.
        answer_s: Longest wait for its answer.
        out_s: Without a good answer until its endpoint is removed from the list.
        dead_s: Without a good answer until it is restarted.
        stop_s: Between SIGTERM and SIGKILL.
        pause_s: Before the first restart; doubled each further time, up to 30.
    """

    every_s: float = 5.0
    answer_s: float = 10.0
    out_s: float = 15.0
    dead_s: float = 60.0
    stop_s: float = 20.0
    pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One server.

    Attributes:
        instance: Its number on the node, from 0.
        port: Its port.
        command: Program and arguments.
        env: Its variables besides those of the process that starts it.
    """

    instance: int
    port: int
    command: tuple[str, ...] = field(repr=False)
    env: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """All servers of one node.

    Attributes:
        host: The node's name, also used for its files in the servers folder.
        address: Address by which other machines reach it.
        folder: The servers folder, shared by all nodes.
        servers: The servers.
        ready: Path that answers 200 when a server is ready.
        timeout_s: Seconds until a server must be ready.
        restarts: How often a server that was ready once is restarted.
        linger_s: Seconds that the servers stay up without a user.
        key: Key of the endpoints, or None.
        watching: How they are monitored.
        model: The model that they serve, or empty if it is not known.
    """

    host: str
    address: str
    folder: str
    servers: tuple[ServerPlan, ...]
    ready: str
    timeout_s: float
    restarts: int
    linger_s: float
    key: str | None = field(default=None, repr=False)
    watching: WatchSettings = WatchSettings()
    model: str = ""

    def server_address(self, server: ServerPlan) -> str:
        """Return ``address:port`` of a server, as in endpoints files."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{server.port}"

    def compute_digest(self) -> str:
        """Return a digest of what is served: the model, and the commands of its servers."""
        served = [self.model, [server.command for server in self.servers]]
        return hashlib.blake2b(orjson.dumps(served), digest_size=16).hexdigest()

    def compute_servers_digest(self) -> str:
        """Return a digest of its servers, whatever the model is called: they may have several."""
        servers = [[server.command, sorted(server.env.items())] for server in self.servers]
        return hashlib.blake2b(orjson.dumps(servers), digest_size=16).hexdigest()

    def to_json(self) -> bytes:
        """Return it as JSON; it may hold secrets, so send it by a pipe, never by a file."""
        return orjson.dumps({"v": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            BackendError: It is no plan, or of another version.
        """
        try:
            plain: dict[str, Any] = orjson.loads(data)
            if plain.pop("v") != VERSION:
                raise BackendError(f"a plan of another version than {VERSION}")
            plain["servers"] = tuple(
                ServerPlan(**{**server, "command": tuple(server["command"])})
                for server in plain["servers"]
            )
            plain["watching"] = WatchSettings(**plain["watching"])
            return cls(**plain)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"no plan of a node's servers: {type(error).__name__}") from None


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """Paths of a node's files in the servers folder.

    The folder itself contains only one endpoints file per host, which exists while at least one of
    the host's servers is ready.

    Attributes:
        folder: The servers folder.
        host: The node's name.
    """

    folder: Path
    host: str

    @property
    def endpoints(self) -> Path:
        """Return the endpoints file: ``address:port`` of each ready server."""
        return self.folder / self.host

    @property
    def lock(self) -> Path:
        """Return the file that the process that serves the node has locked."""
        return self.folder / "locks" / self.host

    @property
    def event_log(self) -> Path:
        """Return the event log of the servers, as JSON lines."""
        return self.folder / "logs" / f"{self.host}.jsonl"

    @property
    def failure(self) -> Path:
        """Return the file with the reason why the node's servers were last given up."""
        return self.folder / "logs" / f"{self.host}.failed"

    @property
    def supervisor_log(self) -> Path:
        """Return the log of a supervisor that a worker started."""
        return self.folder / "logs" / f"{self.host}.log"

    def server_log(self, instance: int) -> Path:
        """Return the log of a server's output."""
        return self.folder / "logs" / f"{self.host}-{instance}.log"

    def create_folders(self) -> None:
        """Create the folders.

        Raises:
            ConfigurationError: They cannot be created.
        """
        try:
            for folder in (self.lock.parent, self.event_log.parent):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"servers folder {self.folder}: cannot be made: {error.strerror}"
            raise ConfigurationError(msg) from None


@dataclass(frozen=True, slots=True)
class ServerFailure:
    """Why all servers of a node were given up.

    Attributes:
        text: The last lines of each.
        plan: Digest of the plan that they belong to.
    """

    text: str
    plan: str

    def write(self, file: Path) -> None:
        """Write it; blocks.

        Raises:
            OSError: The file cannot be written.
        """
        file.write_bytes(orjson.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what :meth:`write` wrote; blocks.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is being written, or damaged.
        """
        try:
            return cls(**orjson.loads(file.read_bytes()))
        except TypeError as error:
            raise ValueError(str(error)) from None


def node_files(plan: NodePlan) -> NodeFiles:
    """Return the paths of a plan's files."""
    return NodeFiles(Path(plan.folder), plan.host)


_NONE_VISIBLE: Final = ("NoDevFiles", "void", "none")
"""Values of the variables of accelerators that hide all: of Slurm, and of container runtimes."""


def split_accelerators(ids: Sequence[str], instances: int) -> list[tuple[str, ...]]:
    """Divide accelerators among servers, neighbours together.

    Raises:
        ConfigurationError: They cannot be divided evenly.
    """
    each, left = divmod(len(ids), instances)
    if left:
        msg = (
            f"node.accelerators: {len(ids)} cannot be divided among {instances} instances; "
            "name fewer in ids, or change node.instances"
        )
        raise ConfigurationError(msg)
    return [tuple(ids[n * each : (n + 1) * each]) for n in range(instances)]


def list_accelerators(
    variable: str,
    ids: Sequence[str] | None,
    count: int | None,
    environment: Mapping[str, str],
) -> list[str]:
    """Return the accelerators of this node.

    The settings (``ids``) come first; then the scheduler's variable, of which ``count`` takes the
    first; then the numbers below ``count``.

    Raises:
        ConfigurationError: The scheduler gives fewer than ``count``, or their number is unknown.
    """
    if ids is not None:
        return list(ids)
    given = environment.get(variable, "") if variable != NO_VARIABLE else ""
    if given:
        present = _parse_visible(given)
        if not present:
            msg = f"node.accelerators: {variable} is {given!r}, which gives this job none"
            raise ConfigurationError(msg)
        if count is not None and len(present) < count:
            msg = (
                f"node.accelerators.count is {count}, and {variable} gives this job "
                f"{len(present)} ({given})"
            )
            raise ConfigurationError(msg)
        return present[:count]
    if count is not None:
        return [str(n) for n in range(count)]
    if variable == NO_VARIABLE:
        return []
    msg = f"node.accelerators: {variable} is not set here; set count or ids"
    raise ConfigurationError(msg)


def _parse_visible(text: str) -> list[str]:
    """Return the accelerators that a variable makes visible, each once.

    As in CUDA, nothing after an index below 0 is visible. Slurm writes ``NoDevFiles`` for none.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    hidden = (n for n, name in enumerate(names) if name.startswith("-") or name in _NONE_VISIBLE)
    return list(dict.fromkeys(names[: next(hidden, None)]))


def plan_servers(  # noqa: PLR0913 - one value per setting
    words: Sequence[str],
    *,
    ports: int,
    instances: int,
    variable: str,
    ids: Sequence[str],
    env: Mapping[str, str],
    model: str,
) -> tuple[ServerPlan, ...]:
    """Return the servers of a node, each with its port and accelerators.

    Args:
        words: The command, with names in braces.
        ports: Port of the first server.
        instances: Number of servers.
        variable: Variable that names a server's accelerators, or ``none``.
        ids: The node's accelerators.
        env: Further variables.
        model: The model's name, for ``{model}``.

    Raises:
        ConfigurationError: The accelerators cannot be divided evenly.
    """
    plans = []
    for instance, accelerators in enumerate(split_accelerators(ids, instances)):
        port = ports + instance
        values = {"port": str(port), "instance": str(instance), "gpus": str(len(accelerators))}
        visible = {} if variable == NO_VARIABLE else {variable: ",".join(accelerators)}
        command = fill_names(words, values | {"model": model})
        plans.append(ServerPlan(instance, port, command, {**visible, **env}))
    return tuple(plans)
