"""A run as a tool that an agent calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import StructuredTool, ToolException
from langgraph.errors import GraphBubbleUp
from pydantic import BaseModel, ValidationError

from ...backends.core.errors import ConfigurationError, FanfoldError
from ...configs.loader import Loaded
from ...nodes.state import RunInput
from ..context import RunContext
from ..map_reduce import MapReduce, build
from ..plan import UNBOUNDED
from ..prepare import RUNS, new_name
from .tool_allowance import Allowance
from .tool_reply import complaint, reply
from .tool_schema import arguments, rows_of

_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+")
_SHOWN: Final = 600

_Said: TypeAlias = tuple[str, dict[str, Any]]


def as_tool(  # noqa: PLR0913 - a public door's options, each by its name
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

    The tool takes ``items``, typed by the columns that the task needs. It answers with JSON: the
    aggregate with its first rows, what failed, and where all results lie; the message's artifact
    is what the graph ended with. What cannot be done is a tool message with the status
    ``error`` that says what to do. The settings' ``budget`` holds for all calls of the tool
    together; no argument raises it.

    Args:
        spec: A preset's name, a YAML file, settings as a mapping, or a :class:`RunContext`, of
            which the settings count and not the folder.
        name: The tool's name; the run's name if None.
        description: What the agent is told; made from the task if None.
        max_items: Most items of one call.
        max_items_in_all: Most items over all calls of this tool; None sets no limit.
        rows: Most rows of each reduce stage that the agent is shown; of the results themselves
            where no stage has rows.
        folder: Where the runs' folders are made; ``fanfold-runs`` below the working directory
            if None.
        interrupt: Have LangGraph's interrupt ask whoever runs the agent for more when the budget
            is exhausted, in place of telling the agent; the budget is then each call's. The
            agent needs a checkpointer.
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
    allowance = Allowance(loaded, max_items_in_all, each=interrupt)
    where = (Path(folder) if folder is not None else Path(RUNS)).absolute()
    errand = _Errand(loaded.config.name, where, allowance, rows, allow_simulated)
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


class _Errand:
    """What the tool does.

    Args:
        name: Of the runs.
        folder: Where their folders are made.
        allowance: What all calls together may ask for and spend.
        rows: Rows that the agent is shown.
        allow_simulated: Whether simulated answers will do.
    """

    def __init__(
        self, name: str, folder: Path, allowance: Allowance, rows: int, allow_simulated: bool
    ) -> None:
        self._name, self._folder, self._allowance = name, folder, allowance
        self._rows, self._allow_simulated = rows, allow_simulated

    async def arun(self, items: list[BaseModel], config: RunnableConfig) -> _Said:
        """Run the items and say how it ended."""
        folder, count = self._new_folder(), len(items)
        with _told(folder):
            loaded = await asyncio.to_thread(self._allowance.begin, count)
            try:
                end = await self._graph(loaded, folder).ainvoke(_given(items), _own_steps(config))
            except GraphBubbleUp:
                count = self._allowance.paused(count)
                raise
            finally:
                ending = asyncio.to_thread(self._allowance.end, count, folder)
                await asyncio.shield(asyncio.create_task(ending))
            return await asyncio.to_thread(reply, end, self._rows), end

    def run(self, items: list[BaseModel], config: RunnableConfig) -> _Said:
        """Do the same for callers without a loop."""
        folder, count = self._new_folder(), len(items)
        with _told(folder):
            loaded = self._allowance.begin(count)
            try:
                end = self._graph(loaded, folder).invoke(_given(items), _own_steps(config))
            except GraphBubbleUp:
                count = self._allowance.paused(count)
                raise
            finally:
                self._allowance.end(count, folder)
            return reply(end, self._rows), end

    def _new_folder(self) -> Path:
        return self._folder / new_name(self._name)

    def _graph(self, loaded: Loaded, folder: Path) -> MapReduce:
        """Return a graph for one call: each has a run folder and a fleet of its own."""
        allowed = self._allow_simulated
        place = folder.parent, folder.name
        context = RunContext.of(loaded, embedded=True, allow_simulated=allowed, place=place)
        return build(context, fixed=True).compile()


def _own_steps(config: RunnableConfig) -> RunnableConfig:
    """Return an agent's configuration without the limit on the agent's own steps."""
    return {**config, "recursion_limit": UNBOUNDED}


def _given(items: list[BaseModel]) -> RunInput:
    return {"items": rows_of(items)}


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn fanfold's errors into messages for the agent."""
    try:
        yield
    except FanfoldError as error:
        raise ToolException(complaint(error, folder)) from error


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
