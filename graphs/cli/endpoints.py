"""List endpoints: their current state, and their statistics in a run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...backends.core.errors import EXIT_DONE, EXIT_USAGE, ConfigurationError
from ...backends.core.parsing import ServerLoad
from ...backends.discovery.connect import check_endpoints, open_endpoint_set
from ...backends.discovery.probe import (
    ProbeResult,
    assume_listed,
    select_model,
    simplify_model,
)
from ...backends.fleet.endpoint import describe_spellings
from ...backends.fleet.server_load import read_server_loads
from ...backends.simulated.process import make_simulation_spec
from ...backends.storage.run_folder import open_folder
from ...configs.loader import LoadedConfig
from ...configs.overrides import Overrides
from ..run.console import print_json, print_lines, print_messages
from ..run.rich_console import Terminal
from .tables import Column, make_table

_NOTHING: Final = "-"
_ENDPOINT: Final = "endpoint"
_WORDS: Final = frozenset({"state", "models", "failures", "model"})
"""Columns of texts, which may be long; the others are numbers and short words."""


@dataclass(frozen=True, slots=True)
class _EndpointList:
    """Current state of the endpoints, why none can be used, and which are listed repeatedly."""

    rows: list[dict[str, Any]]
    model: str | None
    why: str | None
    problem: str | None
    repeated: list[str]


def list_endpoints(config: str, overrides: Overrides, as_json: bool) -> int:
    """List the endpoints of a configuration; return the exit code."""
    loaded, notices = overrides.resolve(config)
    check_endpoints(loaded)
    listed = asyncio.run(_read_endpoint_list(loaded))
    if as_json:
        print_json({"model": listed.model, "chosen": listed.why, "endpoints": listed.rows})
    else:
        print_messages([*notices, *([f"endpoints: {listed.why}"] if listed.why else ())])
        print_messages([f"WARNING: endpoint {line}; it is used once" for line in listed.repeated])
        if deployments := _list_deployments(listed.rows, listed.model):
            _print(deployments, _GATEWAY)
        else:
            _print(listed.rows, _NOW)
        for row in listed.rows:
            if row["error"]:
                print_lines([f"{row[_ENDPOINT]}: {row['error']}"])
    if listed.problem is not None:
        print_messages([f"Error: {listed.problem}"])
        return EXIT_USAGE
    return EXIT_DONE


async def _read_endpoint_list(loaded: LoadedConfig) -> _EndpointList:
    config = loaded.config
    async with open_endpoint_set(config, loaded.plain["endpoints"]) as endpoint_set:
        found = await endpoint_set.probe()
        nodes = [one.spec for one in found if one.reachable and endpoint_set.gateway is None]
        gauges = dict(zip(nodes, await read_server_loads(nodes), strict=True)) if nodes else {}
        name = config.model.name or endpoint_set.model
        if config.endpoints.simulated is not None:
            name = make_simulation_spec(config).model
        found = assume_listed(found, name)
        problem = None
        try:
            name = select_model(found, name, config.endpoints.models).model
        except ConfigurationError as error:
            problem = error.message
        rows = [_row(one, gauges.get(one.spec, ServerLoad())) for one in found]
        repeated = [line for one in found if (line := describe_spellings(one.spec)) is not None]
        return _EndpointList(rows, name, endpoint_set.reason, problem, repeated)


def _row(found: ProbeResult, gauges: ServerLoad) -> dict[str, Any]:
    return {
        _ENDPOINT: found.label,
        "reachable": found.reachable,
        "simulated": found.simulated,
        "models": list(found.models),
        "context": dict(found.max_model_len),
        "running": gauges.running,
        "waiting": gauges.waiting,
        "latency_s": found.latency_s,
        "error": found.error,
        "deployments": [
            {
                "model": about.model,
                "state": None if about.state is None else about.state.value,
                "tokens_per_min": about.tokens_per_min,
                "user_tokens_per_min": about.user_tokens_per_min,
            }
            for about in found.deployments
        ],
    }


def _cells_now(row: dict[str, Any]) -> Iterator[str]:
    yield row[_ENDPOINT]
    yield "no" if row["error"] else "SIMULATED" if row["simulated"] else "yes"
    yield ", ".join(row["models"]) or _NOTHING
    yield ", ".join(f"{n:,}" for n in dict.fromkeys(row["context"].values())) or _NOTHING
    yield _count(row["running"])
    yield _count(row["waiting"])
    yield _milliseconds(row["latency_s"])


def _cells_gateway(row: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of one model of a deployment."""
    yield row[_ENDPOINT]
    yield row["model"]
    yield row["error"] or row["state"] or "unknown"
    yield _count(row["context"])
    yield _count(row["user_tokens_per_min"])
    yield _count(row["tokens_per_min"])


def _list_deployments(rows: Sequence[dict[str, Any]], model: str | None) -> list[dict[str, Any]]:
    """Return a row for each model of each deployment; if a model is named, for this one only."""
    wanted = None if model is None else simplify_model(model)
    return [
        {
            **about,
            _ENDPOINT: row[_ENDPOINT],
            "error": row["error"],
            "context": row["context"].get(about["model"]),
        }
        for row in rows
        for about in row["deployments"]
        if wanted in {None, simplify_model(about["model"])}
    ]


def show_past_endpoints(path: Path, as_json: bool) -> None:
    """Show statistics per endpoint over the finished sessions of a run."""
    from ...backends.storage.endpoints_table import (  # pyarrow is slow to import
        FILE_NAME,
        read_endpoints,
        sum_sessions,
    )

    rows = sum_sessions(read_endpoints(open_folder(path).path / FILE_NAME))
    if as_json:
        print_json({"endpoints": rows})
    elif rows:
        _print(rows, _PAST)
        Terminal().print()
        _print(rows, _COST)
    else:
        print_messages(
            [f"{path}: no endpoint statistics yet; they are written when a session ends"]
        )


def _cells_past(row: dict[str, Any]) -> Iterator[str]:
    yield row[_ENDPOINT]
    yield row["state"]
    yield _count(row["calls"])
    yield (
        ", ".join(f"{n:,} {_shorten_error(name)}" for name, n in row["failures"].items())
        or _NOTHING
    )
    yield " ".join(_milliseconds(row[f"latency_p{q}_s"]) for q in (50, 90, 99))
    yield _count(row["opened"])


def _cells_cost(row: dict[str, Any]) -> Iterator[str]:
    yield row[_ENDPOINT]
    for kind in ("prompt", "cached", "completion", "useful", "wasted"):
        yield _count(row[f"{kind}_tokens"])
    yield _NOTHING if row["usd"] is None else f"{row['usd']:,.2f}"


_NOW: Final = (
    (_ENDPOINT, "reachable", "models", "context", "running", "waiting", "latency"),
    _cells_now,
)
_GATEWAY: Final = (
    (_ENDPOINT, "model", "state", "context", "tokens/min", "all users"),
    _cells_gateway,
)
_PAST: Final = (
    (_ENDPOINT, "state", "calls", "failures", "p50 p90 p99", "opened"),
    _cells_past,
)
_COST: Final = (
    (_ENDPOINT, "prompt", "cached", "completion", "useful", "wasted", "USD"),
    _cells_cost,
)


def _print(rows: Sequence[dict[str, Any]], form: Any) -> None:
    """Print a table; names of endpoints are never shortened."""
    heads, cells = form
    lines = [tuple(cells(row)) for row in rows]
    console = Terminal()
    columns = [
        Column(
            head,
            [line[n] for line in lines],
            is_key=head == _ENDPOINT,
            is_number=head not in _WORDS and head != _ENDPOINT,
        )
        for n, head in enumerate(heads)
    ]
    for part in make_table(columns, console.width, framed=False):
        console.print(part)


def _shorten_error(error: str) -> str:
    """Return an error class without prefix and suffix: ``EndpointLostError`` is ``Lost``."""
    return error.removeprefix("Endpoint").removesuffix("Error") or "Endpoint"


def _count(number: int | None) -> str:
    return _NOTHING if number is None else f"{number:,}"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
