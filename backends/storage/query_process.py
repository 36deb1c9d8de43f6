"""Process that runs one query over a table of results; started as a file, it imports no fanfold.

It reads a JSON object from standard input and writes one to standard output. The query may come
from a configuration that was shared: DuckDB has no access to files, networks, extensions or its
own configuration, and memory, threads, rows and time are bounded.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

POLL_S = 0.5
MOST_BYTES = 5_000_000
"""Size of the rows as JSON."""
SPARE_BYTES = 4 << 30
"""Memory beside that of DuckDB."""
INT64 = 1 << 63


def main() -> None:
    """Answer the request on standard input."""
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    limit_process(request)
    try:
        import duckdb  # noqa: PLC0415 - after the limits are set
    except ImportError as error:
        json.dump({"missing": str(error)}, sys.stdout)
        return
    try:
        answer = run_query(request)
    except (duckdb.Error, pa.ArrowException, OSError, MemoryError) as error:
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def limit_process(request: dict[str, Any]) -> None:
    """Forbid to write files, and bound memory and processor time."""
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CPU, int(request["timeout_s"]) + 60),
    ]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_DATA, (request["memory_mb"] << 20) + SPARE_BYTES))
    for kind, most in limits:
        _, hard = resource.getrlimit(kind)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))


def run_query(request: dict[str, Any]) -> dict[str, Any]:
    """Return the columns and rows of a query, or an error."""
    import duckdb  # noqa: PLC0415 - an optional package

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if request["table"] is None:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(request["schema"])))
        table: Any = schema.empty_table()
    else:
        table = ds.dataset(request["table"], format="parquet")
    connection = duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",
            "temp_directory": "",
            "max_temp_directory_size": "0B",
            "memory_limit": f"{request['memory_mb']}MiB",
            "threads": "1",
        },
    )
    connection.register("__results", table)
    connection.execute(f"CREATE VIEW results AS {select_all(table.schema)}")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")
    statements = connection.extract_statements(request["query"])
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(one.type.name for one in statements) or "nothing"
        return {"error": f"a query is one SELECT statement (found {kinds})"}
    found = connection.execute(statements[0])
    return read_rows(found, request["limit"])


def select_all(schema: Any) -> str:
    """Return the query of the view: all columns, and the fields of the answer by their names."""
    taken = {name.lower() for name in schema.names}
    parts = ["*"]
    answer = schema.field("output").type
    for field in answer if pa.types.is_struct(answer) else ():
        if field.name.lower() not in taken:
            taken.add(field.name.lower())
            parts.append(f"output.{quote(field.name)} AS {quote(field.name)}")
    return f"SELECT {', '.join(parts)} FROM __results"


def quote(name: str) -> str:
    """Return a name as an identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_rows(found: Any, limit: int) -> dict[str, Any]:
    """Return columns and rows as JSON, at most as many as allowed."""
    names = list[str]()
    for about in found.description:
        name, n = about[0], 0
        while name in names:
            n += 1
            name = f"{about[0]}_{n}"
        names.append(name)
    columns = [
        {"name": name, "type": str(about[1])}
        for name, about in zip(names, found.description, strict=True)
    ]
    rows, size = list[dict[str, Any]](), 0
    while len(rows) < limit and (cells := found.fetchone()) is not None:
        row = dict(zip(names, map(to_json, cells), strict=True))
        size += len(json.dumps(row))
        if size > MOST_BYTES:
            return {
                "error": f"the first {len(rows) + 1:,} rows have more than {MOST_BYTES:,} bytes"
            }
        rows.append(row)
    return {"columns": columns, "rows": rows, "more": found.fetchone() is not None}


def to_json(value: Any) -> Any:
    """Return a value of DuckDB as JSON; UUIDs and other values as text."""
    for kinds, convert in CONVERSIONS:
        if isinstance(value, kinds):
            return convert(value)
    return str(value)


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


CONVERSIONS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((type(None), bool), lambda value: value),
    (str, lambda value: value.encode("utf-8", "replace").decode()),
    (int, lambda value: value if -INT64 <= value < INT64 else hex(value)),
    ((float, decimal.Decimal), _finite),
    (dict, lambda value: {str(key): to_json(one) for key, one in value.items()}),
    ((list, tuple, set), lambda value: [to_json(one) for one in value]),
    (datetime.timedelta, lambda value: value.total_seconds()),
    ((datetime.date, datetime.time), lambda value: value.isoformat()),
    ((bytes, bytearray, memoryview), lambda value: base64.b64encode(bytes(value)).decode()),
)


if __name__ == "__main__":
    main()
