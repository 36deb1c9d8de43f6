"""Sites: batch scheduler and nodes of one machine, as YAML files in ``configs/sites``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator

from ..backends.core.errors import ConfigurationError
from .base import Section, expand_home
from .yaml_text import parse_yaml

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FIELD: Final = re.compile(r"\{(\w+)\}")
_ONE_LINE: Final = r"^[^\n\r\x00]+$"

OneLine = Annotated[str, Field(pattern=_ONE_LINE)]
"""Text on one line, not empty."""


class SiteAccelerators(Section):
    """A node's accelerators.

    Attributes:
        variable: Environment variable that hides all but some of them from a process.
        per_node: Number of accelerators of a node, as the variable counts them.
    """

    variable: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    per_node: Annotated[int, Field(ge=1, le=1024)]


class SiteConfig(Section):
    """One machine's scheduler and nodes.

    Lines are shell text for the job script; ``{nodes}``, ``{archive}``, ``{copy}`` and ``{local}``
    are replaced.

    Attributes:
        name: The site's name.
        tested: Where and when it was run, or that it was not.
        facts: Sources of the entries.
        scheduler: ``pbs`` or ``slurm``.
        required: Options of ``fanfold submit`` that every job there needs.
        queue_option: (slurm) ``--partition`` or ``--qos``: the option that names a queue.
        chunk: (pbs) Text after the number of nodes in ``select``.
        filesystems: (pbs) File systems that a job requests, or None.
        directives: Further lines for the scheduler, without ``#PBS`` or ``#SBATCH``.
        modules: Modules to load.
        setup: Further shell lines before the first program starts.
        environment: Variables of the job.
        proxies: Proxy variables for downloads; connections between nodes never use them.
        accelerators: A node's accelerators.
        interface: The network interface between nodes.
        host: Shell text that prints a node's name for other nodes; None: its host name.
        launcher: Command that starts one process on each node.
        local: Node-local folder.
        broadcast: Command that copies a file to that folder on all nodes.
        hints: Notes for the user, shown when a job is submitted.
        reserve_s: Seconds at a job's end for stopping servers and for the scheduler.
        silence_s: (slurm) Seconds without a heartbeat of a job's first node after which the other
            nodes end the job; Slurm would keep it until its walltime.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    tested: OneLine = "not run on that machine"
    facts: list[OneLine] = Field(default_factory=list)
    scheduler: Literal["pbs", "slurm"]
    required: list[Literal["queue", "account"]] = Field(default_factory=list)
    queue_option: Literal["--partition", "--qos"] = "--partition"
    chunk: OneLine | None = None
    filesystems: OneLine | None = None
    directives: list[OneLine] = Field(default_factory=list)
    modules: list[OneLine] = Field(default_factory=list)
    setup: list[OneLine] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    proxies: dict[str, str] = Field(default_factory=dict)
    accelerators: SiteAccelerators | None = None
    interface: OneLine | None = None
    host: OneLine | None = None
    launcher: OneLine
    local: OneLine = "/tmp"
    broadcast: OneLine | None = None
    hints: list[OneLine] = Field(default_factory=list)
    reserve_s: Annotated[int, Field(ge=0, le=3600)] = 60
    silence_s: Annotated[int, Field(ge=5, le=3600)] = 300

    @field_validator("environment", "proxies")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _NAME.fullmatch(name):
                msg = f"{name!r} is not a name of an environment variable"
                raise ValueError(msg)
            if "\n" in text or "\0" in text:
                msg = f"{name}: a value must be one line"
                raise ValueError(msg)
        return value

    @field_validator("launcher", "broadcast")
    @classmethod
    def _fields(cls, value: str | None) -> str | None:
        for name in _FIELD.findall(value or ""):
            if name not in ("nodes", "archive", "copy", "local"):
                msg = f"{{{name}}} is not filled in; there are nodes, archive, copy and local"
                raise ValueError(msg)
        return value


def site_names() -> list[str]:
    """Return the names of the sites that ship with fanfold."""
    folder = files("fanfold.configs") / "sites"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_site(name: str) -> SiteConfig:
    """Load a site by its name, or a site file of the user.

    A file may contain ``like: NAME`` to take all other entries from a site of fanfold.

    Args:
        name: A site's name or a file's path.

    Raises:
        ConfigurationError: There is no such site, or the file is invalid; says what is wrong.
    """
    source, data = _read_site(name)
    like = data.pop("like", None)
    if like is not None:
        if like not in site_names():
            raise ConfigurationError(f"{source}: like: {_unknown(str(like))}")
        data = {"tested": "not run on that machine"} | _read_shipped(str(like)) | data
    try:
        return SiteConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigurationError(_explain_error(error, source)) from None


def fill(text: str, values: Mapping[str, object]) -> str:
    """Replace ``{nodes}`` and the like in a line of a site; other braces belong to the shell."""
    return _FIELD.sub(lambda m: str(values.get(m[1], m[0])), text)


def _read_site(name: str) -> tuple[str, dict[str, Any]]:
    if name in site_names():
        return f"site {name}", _read_shipped(name)
    path = expand_home(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(f"--site {_unknown(name)}, nor a file of that name") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"--site {name}: cannot be read: {reason}") from None
    return name, parse_yaml(text, name)


def _read_shipped(name: str) -> dict[str, Any]:
    text = (files("fanfold.configs") / "sites" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, f"site {name}")


def _unknown(name: str) -> str:
    close = get_close_matches(name, site_names(), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name!r}: neither one of {', '.join(site_names())}{hint}"


def _explain_error(error: ValidationError, source: str) -> str:
    lines = []
    for finding in error.errors(include_url=False):
        key = ".".join(map(str, finding["loc"]))
        if finding["type"] == "extra_forbidden":
            close = get_close_matches(key, SiteConfig.model_fields, n=1)
            lines.append(
                f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        elif finding["type"] == "missing":
            lines.append(f"the key {key!r} is missing")
        else:
            lines.append(f"{key}: {finding['msg'].removeprefix('Value error, ')}")
    return "\n".join(f"{source}: {line}" for line in dict.fromkeys(lines))
