"""Node lists of batch schedulers: PBS' node file and Slurm's compressed list."""

from __future__ import annotations

import itertools
import re
from typing import Final

from ..core.errors import ConfigurationError
from ..fleet.address import NO_KEY, ApiKey, EndpointSpec

_LIST: Final = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PART: Final = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
_MOST: Final = 100_000
"""Hosts that one list may name: a typing error must not fill the memory."""


def parse_pbs(text: str) -> list[str]:
    """Read the text of ``$PBS_NODEFILE``: one host a line, repeated per slot on some systems.

    Returns:
        The hosts in the file's order, each once.
    """
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def expand_slurm(text: str) -> list[str]:
    """Expand ``$SLURM_JOB_NODELIST``, such as ``nid[001-003,010],gpu-[a,b]7,login1``.

    Numbers keep the width of the range's lower bound; several brackets in a name give every
    combination, as ``scontrol show hostnames`` does.

    Raises:
        ConfigurationError: Unbalanced brackets, an empty or a backward range, or too many hosts.
    """
    names = _LIST.findall(text.strip())
    if not names or ",".join(names) != text.strip():
        raise ConfigurationError(f"node list {text!r}: brackets or commas are out of place")
    return list(dict.fromkeys(host for name in names for host in _expand(name)))


def _expand(name: str) -> list[str]:
    parts = [
        _members(inside, name) if bracket else [plain]
        for bracket, inside, plain in (
            (m[0].startswith("["), m[1] or "", m[2] or "") for m in _PART.finditer(name)
        )
    ]
    count = 1
    for part in parts:
        count *= len(part)
    if count > _MOST:
        raise ConfigurationError(f"node list: {name!r} names {count} hosts; {_MOST} is the most")
    return ["".join(combination) for combination in itertools.product(*parts)]


def _members(inside: str, name: str) -> list[str]:
    members: list[str] = []
    for piece in inside.split(","):
        if not piece:
            raise ConfigurationError(f"node list: {name!r} has an empty member in its brackets")
        match = _RANGE.fullmatch(piece)
        if match is None:
            members.append(piece)
            continue
        low, high = match[1], match[2] or match[1]
        if int(high) < int(low) or int(high) - int(low) >= _MOST:
            raise ConfigurationError(f"node list: {name!r} has the impossible range {piece!r}")
        members += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return members


def hosts_to_specs(
    hosts: list[str],
    port: int,
    *,
    per_host: int = 1,
    suffix: str | None = None,
    api_key: ApiKey = NO_KEY,
) -> list[EndpointSpec]:
    """Turn host names into endpoints.

    Args:
        hosts: Names as the scheduler gave them.
        port: Port of the first server on each host; the others follow.
        per_host: Servers on each host.
        suffix: Domain of the fast network, put behind the short name (``.hsn.cm.example``),
            or None to use the names as they are.
        api_key: Key for all of them.
    """
    names = [h if suffix is None else h.split(".")[0] + suffix for h in hosts]
    return [
        EndpointSpec(f"http://{name}:{port + rank}", api_key)
        for name in names
        for rank in range(per_host)
    ]
