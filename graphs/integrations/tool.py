"""``as_tool()``: a batch as a LangChain tool, with its schema, allowance and reply."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson
import pyarrow.parquet as pq
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import StructuredTool, ToolException
from langgraph.errors import GraphBubbleUp
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ...backends.budget.budget import read_spent_before
from ...backends.budget.spend_log import open_spend_logs
from ...backends.core.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    FanfoldError,
    InputError,
    RunStoppedError,
)
from ...backends.core.money import NANO_PER_USD, Amount
from ...backends.core.types import Json
from ...backends.inputs.formats import needed_columns
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import get_run_ids, open_folder
from ...configs.budget import BudgetConfig
from ...configs.loader import LoadedConfig, load_config
from ...configs.models import RunConfig
from ...nodes.state import RunInput
from ..context import RunContext
from ..map_reduce import MapReduce, build_bound_graph
from ..run.prepare import RUNS_FOLDER, new_folder_name
from ..run.shard_plan import UNBOUNDED_STEPS

_CAPS: Final = ("usd", "tokens", "requests")
_REPORT: Final = "Report this to the user: only the tool's owner can allow more."


class Allowance:
    """Items and budget that all calls of a tool share.

    Args:
        loaded: The settings; their ``budget`` applies to all calls together, or to each.
        most_items: Maximum items over all calls; None sets no limit.
        each: The budget applies to each call.
    """

    def __init__(self, loaded: LoadedConfig, most_items: int | None, *, each: bool) -> None:
        self._loaded, self._limits = (
            loaded,
            {} if each else _configured_limits(loaded.config.budget),
        )
        self._most = self._left = most_items
        self._spent, self._busy = Amount(), False
        self._lock = threading.Lock()  # sync calls come from several threads

    def begin_call(self, items: int) -> LoadedConfig:
        """Reserve items; return the settings of a call, with the remaining budget.

        Every call that begins must call :meth:`end_call`. Blocks.

        Raises:
            ToolException: Too little is left, or another call is using the budget.
        """
        with self._lock:
            loaded = self._remaining_settings() if self._limits else self._loaded
            self._take_items(items)
            self._busy = bool(self._limits)
            return loaded

    def pause_call(self, items: int) -> int:
        """Release the items of a call that will reserve them again on resume; return 0.

        Args:
            items: Items that the call has reserved.
        """
        with self._lock:
            self._left = None if self._left is None else self._left + items
        return 0

    def end_call(self, items: int, folder: Path) -> None:
        """Record what a call has spent; blocks.

        Args:
            items: Items that it has reserved; released if it created no run folder.
            folder: Its run folder.
        """
        with self._lock:
            self._busy = False
            if not folder.exists():
                self._left = None if self._left is None else self._left + items
            elif self._limits:
                self._spent = self._spent.plus(_read_spent(folder))

    def _take_items(self, items: int) -> None:
        if self._left is None or items <= self._left:
            self._left = None if self._left is None else self._left - items
            return
        msg = (
            f"{items:,} items are more than the {self._left:,} left of the {self._most:,} that "
            f"this tool's owner allows. {'Ask for fewer.' if self._left else _REPORT}"
        )
        raise ToolException(msg)

    def _remaining_settings(self) -> LoadedConfig:
        if self._busy:
            msg = "Another call of this tool is spending its budget; call again when it has ended."
            raise ToolException(msg)
        spent = {
            "usd": self._spent.nano_usd / NANO_PER_USD,
            "tokens": self._spent.tokens,
            "requests": self._spent.requests,
        }
        left = {key: cap - spent[key] for key, cap in self._limits.items()}
        if gone := [key for key, rest in left.items() if rest <= 0]:
            msg = f"The budget of this tool is spent ({', '.join(gone)}). {_REPORT}"
            raise ToolException(msg)
        changes = {f"budget.{key}": rest for key, rest in left.items()}
        return load_config(self._loaded.raw, settings={**changes, "budget.on_limit": "stop"})


def _configured_limits(budget: BudgetConfig) -> dict[str, Any]:
    return {key: cap for key in _CAPS if (cap := getattr(budget, key)) is not None}


def _read_spent(path: Path) -> Amount:
    """Return the most that a run may have spent."""
    folder = open_folder(path)
    about = folder.read_provenance()
    with Journal(folder.journal, get_run_ids(about), about["input"]["items"]) as journal:
        return read_spent_before(folder, open_spend_logs(folder, get_run_ids(about)), journal)


_TEXT: Final = 300
_FAILURES: Final = 5


def format_reply(end: Mapping[str, Any], rows: int) -> str:
    """Return the result of a run as JSON text for a model; blocks.

    Args:
        end: Output of the graph.
        rows: Maximum rows per aggregator.

    Raises:
        BudgetExhaustedError: The run needs a higher budget, and no agent can be interrupted.
    """
    if asked := end.get("__interrupt__"):
        raise BudgetExhaustedError(str(asked[0].value["why"]))
    progress, results = end["progress"], end["results"]
    reply: dict[str, Json] = {
        "items": progress["items"],
        "done": progress["done"],
        "failed": progress["failed"],
        "simulated": results["simulated"],
        "aggregate": [_stage(stage, rows) for stage in end["aggregate"]],
        "results": {"table": results["table"], "folder": results["folder"]},
    }
    if rows and not any("rows" in stage for stage in end["aggregate"]):
        reply["first"] = list(_first(Path(results["table"]), rows))
    if progress["failed"]:
        reply["failures"] = list(_failures(Path(results["failures"])))
    if results["simulated"]:
        reply["note"] = "simulated answers: they come from no model and are meaningless"
    return orjson.dumps(reply).decode()


def _stage(stage: Mapping[str, Any], rows: int) -> dict[str, Json]:
    """Return an aggregate entry with its first rows and the number of further rows."""
    shown = dict(_short(stage))
    for key in ("rows", "counts", "groups"):
        found = stage.get(key)
        if not isinstance(found, Sequence):
            continue
        if key == "groups":
            shown[key] = [_stage(group, rows) for group in found[:rows]]
        elif len(found) > rows:
            shown[key] = _short(found[:rows])
        if len(found) > rows:
            shown[f"more_{key}"] = len(found) - rows
    return shown


def _short(value: Json) -> Json:
    """Return plain data with truncated texts."""
    if isinstance(value, str):
        return value if len(value) <= _TEXT else value[: _TEXT - 1] + "…"
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return value


def _first(table: Path, rows: int) -> Iterator[Json]:
    """Yield the first answers of a results table; blocks."""
    for batch in pq.ParquetFile(table).iter_batches(rows, columns=["id", "output"]):
        yield from (_short(row) for row in batch.to_pylist() if row["output"] is not None)
        return


def _failures(file: Path) -> Iterator[Json]:
    """Yield the first failed items; blocks."""
    with file.open("rb") as lines:
        for line, _ in zip(lines, range(_FAILURES), strict=False):
            record = orjson.loads(line)
            yield _short({key: record[key] for key in ("id", "error_class", "error")})


def format_error(error: FanfoldError, folder: Path) -> str:
    """Return an error as text that tells an agent what to do.

    Args:
        error: The error.
        folder: The run's folder.
    """
    if isinstance(error, InputError):
        return f"{error.message}. No request was sent; correct the items and call again."
    if isinstance(error, RunStoppedError):
        return (
            f"{error.message}. Finished items are kept in {folder}. Do not call again now; report "
            "this to the user."
        )
    return f"{error.message}. You cannot fix this: report it to the user."


Value: TypeAlias = str | int | float | bool

_FORBID = ConfigDict(extra="forbid", populate_by_name=False)


class ToolArguments(BaseModel):
    """The arguments of one call; a subclass per task defines ``items``."""

    model_config = _FORBID


def make_arguments_schema(config: RunConfig, most: int) -> type[ToolArguments]:
    """Return the argument schema of a task.

    Column names need not be valid in Python, so each is the alias of a numbered field.

    Args:
        config: The settings.
        most: Maximum items of one call.
    """
    names = needed_columns(config)
    smiles, id_column = config.input.smiles, config.input.id or "id"
    needed = dict.fromkeys([*names, *([smiles] if smiles else [])])
    fields: dict[str, Any] = {}
    for number, name in enumerate(needed):
        kind: Any = str if _is_smiles(name, smiles) else Value
        about = "SMILES of one molecule" if _is_smiles(name, smiles) else f"Column {name!r}"
        fields[f"column_{number}"] = (kind, Field(alias=name, description=about))
    if id_column not in needed:
        about = "Name of the item, unique; give one to all items or to none"
        fields["name"] = (str | int | None, Field(None, alias=id_column, description=about))
    row = create_model("Item", __config__=_FORBID, **fields)
    about = f"The items, one object each; at most {most:,} in one call"
    items: Any = (list[row], Field(min_length=1, max_length=most, description=about))  # type: ignore[valid-type]
    return create_model("Arguments", __base__=ToolArguments, items=items)


def dump_rows(items: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Return rows as plain data by column name, without missing ids."""
    return [item.model_dump(by_alias=True, exclude_unset=True, exclude_none=True) for item in items]


def _is_smiles(name: str, column: str | None) -> bool:
    return name == column or name.lower() == "smiles"


_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+")
_SHOWN: Final = 600

_Reply: TypeAlias = tuple[str, dict[str, Any]]


def as_tool(  # noqa: PLR0913 - keyword options of a public function
    spec: str | Path | Mapping[str, Any] | RunContext,
    *,
    name: str | None = None,
    description: str | None = None,
    max_items: int = 1000,
    max_items_in_all: int | None = None,
    rows: int = 10,
    folder: str | Path | None = None,
    interrupt: bool = False,
    allow_simulated: bool = False,
) -> StructuredTool:
    """Return a LangChain tool that runs a whole batch, for agents.

    The tool takes ``items``, typed by the columns that the task needs. It returns JSON: the
    aggregate with its first rows, the failures, and the paths of all results; the message's
    artifact is the output of the graph. An error is a tool message with the status ``error`` that
    says what to do. The ``budget`` of the settings applies to all calls of the tool together; no
    argument raises it.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`, of
            whose folder is ignored.
        name: The tool's name; None uses the run's name.
        description: The description for the agent; None derives it from the task.
        max_items: Maximum items of one call.
        max_items_in_all: Maximum items over all calls of this tool; None sets no limit.
        rows: Maximum rows per aggregator in the reply; of the results themselves if no aggregator
            has rows.
        folder: Folder for the run folders; None uses ``fanfold-runs`` in the working directory.
        interrupt: When the budget is exhausted, interrupt the graph so that the agent's user can
            raise it, instead of returning an error to the agent; the budget then applies to each
            call. The agent needs a checkpointer.
        allow_simulated: Allow a simulated fleet.

    Raises:
        ConfigurationError: A setting is wrong, or the fleet is simulated without permission.
    """
    context = spec if isinstance(spec, RunContext) else RunContext(config=_config(spec))
    loaded = context.loaded
    if loaded.config.endpoints.simulated is not None and not allow_simulated:
        msg = (
            "as_tool: these settings run on a simulated fleet, whose answers are meaningless; set "
            "endpoints, or allow_simulated=True for a trial"
        )
        raise ConfigurationError(msg)
    if loaded.config.input.limit is not None:
        max_items = min(max_items, loaded.config.input.limit)
    allowance = Allowance(loaded, max_items_in_all, each=interrupt)
    where = (Path(folder) if folder is not None else Path(RUNS_FOLDER)).absolute()
    batch_tool = BatchTool(loaded.config.name, where, allowance, rows, allow_simulated)
    return StructuredTool(
        name=_NAME.sub("_", name or loaded.config.name)[:64],
        description=description or _description(loaded),
        args_schema=make_arguments_schema(loaded.config, max_items),
        func=batch_tool.run,
        coroutine=batch_tool.arun,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_explain_arguments,
    )


def _config(spec: str | Path | Mapping[str, Any]) -> str | dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else str(spec)


class BatchTool:
    """The implementation of the tool.

    Args:
        name: Name of the runs.
        folder: Folder for the run folders.
        allowance: Items and budget that all calls share.
        rows: Maximum rows per aggregator in the reply.
        allow_simulated: Allow a simulated fleet.
    """

    def __init__(
        self, name: str, folder: Path, allowance: Allowance, rows: int, allow_simulated: bool
    ) -> None:
        self._name, self._folder, self._allowance = name, folder, allowance
        self._rows, self._allow_simulated = rows, allow_simulated

    async def arun(self, items: list[BaseModel], config: RunnableConfig) -> _Reply:
        """Run the items; return the reply and the output of the graph."""
        folder, count = self._new_folder(), len(items)
        with _explain_errors(folder):
            loaded = await asyncio.to_thread(self._allowance.begin_call, count)
            try:
                end = await self._build_graph(loaded, folder).ainvoke(
                    _make_input(items), _without_step_limit(config)
                )
            except GraphBubbleUp:
                count = self._allowance.pause_call(count)
                raise
            finally:
                ending = asyncio.to_thread(self._allowance.end_call, count, folder)
                await asyncio.shield(asyncio.create_task(ending))
            return await asyncio.to_thread(format_reply, end, self._rows), end

    def run(self, items: list[BaseModel], config: RunnableConfig) -> _Reply:
        """Run the items without an event loop; return the reply and the output of the graph."""
        folder, count = self._new_folder(), len(items)
        with _explain_errors(folder):
            loaded = self._allowance.begin_call(count)
            try:
                end = self._build_graph(loaded, folder).invoke(
                    _make_input(items), _without_step_limit(config)
                )
            except GraphBubbleUp:
                count = self._allowance.pause_call(count)
                raise
            finally:
                self._allowance.end_call(count, folder)
            return format_reply(end, self._rows), end

    def _new_folder(self) -> Path:
        return self._folder / new_folder_name(self._name)

    def _build_graph(self, loaded: LoadedConfig, folder: Path) -> MapReduce:
        """Return a graph for one call, with a separate run folder and fleet."""
        allowed = self._allow_simulated
        context = RunContext.from_loaded(
            loaded, embedded=True, allow_simulated=allowed, new_folder=(folder.parent, folder.name)
        )
        return build_bound_graph(context, fixed=True).compile()


def _without_step_limit(config: RunnableConfig) -> RunnableConfig:
    """Return an agent's configuration without the limit on the agent's own steps."""
    return {**config, "recursion_limit": UNBOUNDED_STEPS}


def _make_input(items: list[BaseModel]) -> RunInput:
    return {"items": dump_rows(items)}


@contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    """Turn fanfold's errors into messages for the agent."""
    try:
        yield
    except FanfoldError as error:
        raise ToolException(format_error(error, folder)) from error


def _explain_arguments(error: ValidationError | Any) -> str:
    """Return what is wrong with the arguments, without their values."""
    found = [
        f"{'.'.join(map(str, part['loc']))}: {part['msg']}"
        for part in error.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""  # noqa: PLR2004 - a short text
    return f"The arguments do not fit: {'; '.join(found[:5])}{more}. Correct them and call again."


def _description(loaded: LoadedConfig) -> str:
    task = loaded.config.task
    question = task.prompt if task.messages is None else task.messages[-1].content
    asked = " ".join(question.split())
    asked = asked if len(asked) <= _SHOWN else asked[: _SHOWN - 1] + "…"
    stages = ", ".join(
        " ".join(
            [stage.op]
            + [f"of {field}" for field in [getattr(stage, "field", None)] if field]
            + [f"by {field}" for field in [getattr(stage, "group_by", None)] if field]
        )
        for stage in loaded.config.reduce
    )
    ends = f" Returns {stages}, and the paths of the full results." if stages else ""
    return (
        f"Asks a language model the same question about each of many items, all in one call: "
        f"“{asked}”{ends} Pass all items at once, not one by one."
    )
