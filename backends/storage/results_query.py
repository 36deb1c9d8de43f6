"""Queries over the results of a run, by DuckDB in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa

from ..core.errors import ConfigurationError, MissingExtraError
from ..core.types import Json

_PROCESS: Final = Path(__file__).with_name("query_process.py")
_KEPT: Final = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUSERBASE",
)
"""Variables that Python needs to start; the process gets no others, as they may be secrets."""


@dataclass(frozen=True, slots=True)
class ResultQuery:
    """A query over the view ``results``, with its limits.

    Attributes:
        query: One SELECT statement.
        limit: Maximum number of rows that are kept.
        memory_mb: Memory of DuckDB.
        timeout_s: Seconds after which it is stopped.
    """

    query: str
    limit: int
    memory_mb: int
    timeout_s: float

    async def run(self, table: Path) -> dict[str, Json]:
        """Run it over a table of results.

        Returns:
            ``columns``, ``rows``, and ``more``: whether there are further rows.

        Raises:
            ConfigurationError: It failed, or took too long.
        """
        return await self._ask({"table": str(table), "schema": None})

    async def check(self, schema: pa.Schema) -> None:
        """Run it over an empty table.

        Raises:
            ConfigurationError: It is no query over these columns.
        """
        encoded = base64.b64encode(schema.serialize().to_pybytes()).decode()
        await self._ask({"table": None, "schema": encoded})

    async def _ask(self, source: Mapping[str, Json]) -> dict[str, Json]:
        request = orjson.dumps({**asdict(self), **source})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(_PROCESS),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            start_new_session=True,  # this process handles a terminal's interrupt
        )
        try:
            async with asyncio.timeout(self.timeout_s):
                output, said = await process.communicate(request)
        except TimeoutError:
            msg = f"the query took longer than timeout_s ({self.timeout_s:g} s)"
            raise ConfigurationError(msg) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return _read_answer(process.returncode, output, said)


def _read_answer(code: int | None, output: bytes, said: bytes) -> dict[str, Any]:
    """Return the answer of the process.

    Raises:
        ConfigurationError: The query failed, or the process ended without an answer.
    """
    try:
        answer: dict[str, Any] = orjson.loads(output)
    except orjson.JSONDecodeError:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        msg = f"the process of the query ended with code {code}: {last or 'memory may be short'}"
        raise ConfigurationError(msg) from None
    if "missing" in answer:
        raise MissingExtraError("reduce: op sql", "analysis")
    if "error" in answer:
        raise ConfigurationError(" ".join(str(answer["error"]).split()))
    return answer
