"""A run as a tool that an agent calls."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import StructuredTool, ToolException
from pydantic import BaseModel, ValidationError

from ..backends.contract.errors import ConfigurationError, FanfoldError, InputError
from ..configs.load import Loaded
from .context import RunContext
from .map_reduce import MapReduce, build
from .prepare import RUNS, default_folder
from .tool_reply import complaint, reply
from .tool_schema import arguments, rows_of

_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+")
_SHOWN: Final = 600


def as_tool(  # noqa: PLR0913 - a public door's options, each by its name
    spec: str | Path | Mapping[str, Any] | RunContext,
    *,
    name: str | None = None,
    description: str | None = None,
    max_items: int = 1000,
    max_items_in_all: int | None = None,
    rows: int = 10,
    folder: str | Path | None = None,
    allow_simulated: bool = False,
) -> StructuredTool:
    """Return a LangChain tool that runs a whole batch, for agents.

    The tool takes ``items``, typed by the columns that the task needs. It answers with JSON: the
    aggregate with its first rows, what failed, and where all results lie; the message's artifact
    is what the graph ended with. What cannot be done is a tool message with the status
    ``error`` that says what to do. What a call may cost is set here and in the settings; no
    argument raises it.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`.
        name: The tool's name; the run's name if None.
        description: What the agent is told; made from the task if None.
        max_items: Most items of one call.
        max_items_in_all: Most items over all calls of this tool; None sets no limit.
        rows: Most rows of each reduce stage that the agent is shown.
        folder: Where the runs' folders are made; ``fanfold-runs`` below the working directory
            if None.
        allow_simulated: Whether answers of a simulated fleet will do.

    Raises:
        ConfigurationError: A setting is wrong, or the fleet is simulated and that was not
            allowed.
    """
    context = spec if isinstance(spec, RunContext) else RunContext(config=_config(spec))
    loaded = context.loaded
    if loaded.config.endpoints.simulated is not None and not allow_simulated:
        msg = (
            "as_tool: these settings run on a simulated fleet, whose answers mean nothing; set "
            "endpoints, or allow_simulated=True for a trial"
        )
        raise ConfigurationError(msg)
    if loaded.config.input.limit is not None:
        max_items = min(max_items, loaded.config.input.limit)
    where = Path(folder) if folder is not None else Path(RUNS)
    errand = _Errand(loaded, _Allowance(max_items_in_all), rows, where.absolute(), allow_simulated)
    return StructuredTool(
        name=_NAME.sub("_", name or loaded.config.name)[:64],
        description=description or _description(loaded),
        args_schema=arguments(loaded.config, max_items),
        func=errand.run,
        coroutine=errand.arun,
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_unfit,
    )


def _config(spec: str | Path | Mapping[str, Any]) -> str | dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else str(spec)


class _Allowance:
    """How many items all calls together may still ask for."""

    def __init__(self, most: int | None) -> None:
        self._most, self._left = most, most
        self._lock = threading.Lock()  # sync calls come from several threads

    @contextmanager
    def taken(self, items: int) -> Iterator[None]:
        """Take so many; they are given back if the input was refused, so that nothing was asked.

        Raises:
            ToolException: So many are not left.
        """
        with self._lock:
            if self._left is not None and items > self._left:
                msg = (
                    f"{items:,} items are more than the {self._left:,} left of the "
                    f"{self._most:,} that this tool's owner allows. "
                    + ("Ask for fewer." if self._left else "Report this to the user.")
                )
                raise ToolException(msg)
            if self._left is not None:
                self._left -= items
        try:
            yield
        except InputError:
            with self._lock:
                if self._left is not None:
                    self._left += items
            raise


class _Errand:
    """What the tool does.

    Args:
        loaded: The settings.
        allowance: What all calls together may ask for.
        rows: Rows that the agent is shown.
        folder: Where run folders are made.
        allow_simulated: Whether simulated answers will do.
    """

    def __init__(
        self,
        loaded: Loaded,
        allowance: _Allowance,
        rows: int,
        folder: Path,
        allow_simulated: bool,
    ) -> None:
        self._loaded, self._rows, self._folder = loaded, rows, folder
        self._allowance, self._allow_simulated = allowance, allow_simulated

    async def arun(
        self, items: list[BaseModel], config: RunnableConfig
    ) -> tuple[str, dict[str, Any]]:
        """Run the items and say how it ended."""
        with _told(), self._allowance.taken(len(items)):
            end = await self._graph().ainvoke({"items": rows_of(items)}, config)
            return await asyncio.to_thread(reply, end, self._rows), end

    def run(self, items: list[BaseModel], config: RunnableConfig) -> tuple[str, dict[str, Any]]:
        """Do the same for callers without a loop."""
        with _told(), self._allowance.taken(len(items)):
            end = self._graph().invoke({"items": rows_of(items)}, config)
            return reply(end, self._rows), end

    def _graph(self) -> MapReduce:
        """Return a graph for one call: each has a run folder and a fleet of its own."""
        path = self._folder / default_folder(self._loaded.config.name).name
        context = RunContext.of(
            self._loaded, embedded=True, allow_simulated=self._allow_simulated, out=str(path)
        )
        return build(context).compile()


@contextmanager
def _told() -> Iterator[None]:
    """Turn fanfold's errors into messages for the agent."""
    try:
        yield
    except FanfoldError as error:
        raise ToolException(complaint(error)) from error


def _unfit(error: ValidationError | Any) -> str:
    """Say what is wrong with the arguments, without the values."""
    found = [
        f"{'.'.join(map(str, part['loc']))}: {part['msg']}"
        for part in error.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""  # noqa: PLR2004 - a short text
    return f"The arguments do not fit: {'; '.join(found[:5])}{more}. Correct them and call again."


def _description(loaded: Loaded) -> str:
    task = loaded.config.task
    asked = " ".join(task.prompt.split())
    asked = asked if len(asked) <= _SHOWN else asked[: _SHOWN - 1] + "…"
    stages = ", ".join(
        f"{stage.op} of {field}" if (field := getattr(stage, "field", None)) else stage.op
        for stage in loaded.config.reduce
    )
    ends = f" Returns {stages}, and where the full results lie." if stages else ""
    return (
        f"Asks a language model the same question about each of many items, all in one call: "
        f"“{asked}”{ends} Pass all items at once, not one by one."
    )
