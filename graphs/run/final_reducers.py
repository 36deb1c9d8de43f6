"""Entries of ``reduce`` that read the results of all items at the end: ``sql`` and ``python``."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from ...backends.core.errors import ConfigurationError, FanfoldError, RunStoppedError
from ...backends.core.types import Json
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.results import ResultLayout, iter_json_rows
from ...backends.storage.results_query import ResultQuery
from ...backends.storage.run_folder import RunFolder
from ...configs.aggregators import (
    AggregatorConfig,
    PythonConfig,
    ReduceEntry,
    SqlConfig,
)
from ...configs.loader import LoadedConfig
from .result_rows import ResultSource, make_result_layout

logger = logging.getLogger(__name__)

RowReducer: TypeAlias = Callable[[Iterator[dict[str, Json]]], Json]
"""A user's function: gets the rows of the results in input order, returns plain data."""

_MOST_BYTES: Final = 5_000_000
"""Size of a function's result as JSON."""
_OPTIONS: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
_CHECK_S: Final = 60.0


def read_layout(loaded: LoadedConfig, folder: RunFolder) -> ResultLayout:
    """Return the columns of the results of a run in preparation; blocks.

    Raises:
        JournalError: Its items cannot be read.
    """
    with ItemStore(folder.items) as store:
        fold = loaded.config.make_fold()
        task = loaded.config.task
        certain = task.certainty is not None
        return make_result_layout(task.answer_schema, store, fold=fold, certain=certain)


async def check_final_reducers(loaded: LoadedConfig, layout: ResultLayout) -> None:
    """Run each query over an empty table, and import each function.

    Args:
        loaded: The settings.
        layout: Columns of the results.

    Raises:
        ConfigurationError: One of them cannot work; names the entry.
        MissingExtraError: DuckDB is not installed.
    """
    for n, entry in enumerate(loaded.config.reduce):
        try:
            if isinstance(entry, SqlConfig):
                timeout_s = max(entry.timeout_s, _CHECK_S)
                query = ResultQuery(entry.query, entry.limit, entry.memory_mb, timeout_s)
                await query.check(layout.to_arrow())
            elif isinstance(entry, PythonConfig):
                await asyncio.to_thread(load_function, entry)
        except ConfigurationError as error:
            if type(error) is not ConfigurationError:
                raise
            msg = f"{loaded.source}: reduce.{n}: {error.message}"
            raise ConfigurationError(msg) from error


async def add_final_results(
    entries: Sequence[ReduceEntry],
    aggregate: Iterable[dict[str, Any]],
    folder: RunFolder,
    source: ResultSource,
) -> list[dict[str, Any]]:
    """Run the final reducers; return the results of all entries in their order.

    One that fails has its message under ``error``: the results of the run are complete.

    Args:
        entries: The entries of ``reduce``.
        aggregate: The results of the aggregators among them, then of those that no entry names
            (the agreement of samples).
        folder: The run's folder, in which the table of results is written.
        source: The results.

    Raises:
        JournalError: The results cannot be read.
    """
    known, found = iter(aggregate), list[dict[str, Any]]()
    for n, entry in enumerate(entries):
        if isinstance(entry, AggregatorConfig):
            found.append(next(known))
            continue
        result = await _run_entry(entry, folder, source)
        if "error" in result:
            logger.warning(
                "reduce.%d: %s. The results are complete; correct the entry and run it again with: "
                "fanfold resume %s --set 'reduce.%d.…'",
                n,
                result["error"],
                folder.path,
                n,
            )
        found.append(result)
    return [*found, *known]


async def _run_entry(entry: ReduceEntry, folder: RunFolder, source: ResultSource) -> dict[str, Any]:
    try:
        if isinstance(entry, SqlConfig):
            head: dict[str, Any] = {"op": entry.op, "query": entry.query}
            query = ResultQuery(entry.query, entry.limit, entry.memory_mb, entry.timeout_s)
            return head | await query.run(folder.results)
        assert isinstance(entry, PythonConfig), "there are no others"
        head = {"op": entry.op, "function": entry.function}
        return head | {"result": await _call_aside(entry, source)}
    except ConfigurationError as error:
        return head | {"error": error.message}


def load_function(entry: PythonConfig) -> RowReducer:
    """Import a user's function.

    Raises:
        ConfigurationError: It cannot be imported, or is not a plain function.
    """
    from ...backends.workers.registry import import_object  # noqa: PLC0415 - imports all backends

    name, key = entry.function, "function"
    with _importing_from(entry.folder):
        try:
            found: Any = import_object(name, key)
        except FanfoldError:
            raise
        except (Exception, SystemExit) as error:  # a user's module runs when it is imported
            msg = f"{key}: {name} cannot be imported: {_describe_error(error, None)}"
            raise ConfigurationError(msg) from error
    _check_origin(entry)
    if not callable(found) or inspect.iscoroutinefunction(found):
        msg = f"{key}: {name} is not a plain function; it gets the rows of the results"
        raise ConfigurationError(msg)
    _check_parameters(found, name, key)
    function: RowReducer = found
    return function


def _check_parameters(function: Callable[..., Any], name: str, key: str) -> None:
    """Check that a function takes one argument.

    Raises:
        ConfigurationError: It takes none, or more.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        signature.bind(())
    except TypeError as error:
        msg = (
            f"{key}: {name}{signature} cannot be called with one argument ({error}); "
            "it gets an iterator of the results' rows"
        )
        raise ConfigurationError(msg) from error


def _check_origin(entry: PythonConfig) -> None:
    """Check that the module is that of the folder, not one of the same name loaded before.

    Raises:
        ConfigurationError: It is another one.
    """
    module = entry.function.partition(":")[0]
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if entry.folder is None or loaded is None:
        return
    base = Path(entry.folder, *module.split("."))
    for mine in (base.with_suffix(".py"), base / "__init__.py"):
        if mine.is_file() and not mine.samefile(loaded):
            msg = f"function: {module} was loaded from {loaded}, not from {mine}; rename the module"
            raise ConfigurationError(msg)


@contextmanager
def _importing_from(folder: str | None) -> Iterator[None]:
    """Let the block import modules of a folder."""
    if folder is None:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


async def _call_aside(entry: PythonConfig, source: ResultSource) -> Json:
    """Call a user's function in a thread; one that is cancelled ends at its next row.

    The process does not wait for the thread when it exits.

    Raises:
        ConfigurationError: It failed, or its result is not plain data.
        JournalError: The results cannot be read.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Json] = loop.create_future()
    cancelled = threading.Event()

    def finish(result: Json, error: FanfoldError | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def work() -> None:
        result: Json = None
        problem: FanfoldError | None = FanfoldError(f"{entry.function}: ended without a result")
        try:
            result = _call(entry, _iter_until(source, cancelled))
            problem = None
        except FanfoldError as error:
            problem = error
        finally:
            if not cancelled.is_set():
                loop.call_soon_threadsafe(finish, result, problem)

    threading.Thread(target=work, name=f"reduce {entry.function}", daemon=True).start()
    try:
        return await done
    finally:
        cancelled.set()


def _iter_until(source: ResultSource, cancelled: threading.Event) -> Iterator[dict[str, Json]]:
    for row in iter_json_rows(source.iter_rows(), source.layout):
        if cancelled.is_set():
            raise RunStoppedError("the run was stopped")
        yield row


def _call(entry: PythonConfig, rows: Iterator[dict[str, Json]]) -> Json:
    """Return the result of a user's function as plain data.

    Raises:
        ConfigurationError: It failed, or its result is not plain data.
        FanfoldError: The rows cannot be read.
    """
    function = load_function(entry)
    try:
        with _importing_from(entry.folder):
            result = function(rows)
    except FanfoldError:
        raise
    except BaseException as error:  # a signal's KeyboardInterrupt never comes to this thread
        msg = f"{entry.function} failed: {_describe_error(error, function)}"
        raise ConfigurationError(msg) from error
    from ...nodes.aggregators.base import (  # noqa: PLC0415 - imports all aggregators
        sanitize_json,
    )

    try:
        text = orjson.dumps(result, option=_OPTIONS)
    except TypeError as error:
        msg = (
            f"{entry.function} returned {type(result).__name__}, which cannot be written as JSON "
            f"({error}); return dicts, lists, texts and numbers"
        )
        raise ConfigurationError(msg) from error
    if len(text) > _MOST_BYTES:
        msg = (
            f"{entry.function} returned {len(text):,} bytes of JSON, more than {_MOST_BYTES:,}; "
            "return a summary, and write the rest to a file"
        )
        raise ConfigurationError(msg)
    return sanitize_json(orjson.loads(text))


def _describe_error(error: BaseException, function: Any) -> str:
    """Return an error in words, with the place in the user's code where it occurred."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    own = [frame for frame in frames if frame.filename == file] or frames[-1:]
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})"
