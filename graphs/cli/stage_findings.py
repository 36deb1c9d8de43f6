"""What the stages of a pipeline have found, as short text: aggregates, summaries, rankings."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...backends.core.terminal import count_nouns
from ...backends.storage.results_schema import ResultRow
from ...backends.storage.run_folder import read_aggregate
from ..run.pipeline_report import PipelineState, StageState
from ..run.result_rows import open_result_source
from .tables import Column, format_cell, make_table, show_aggregate

_MOST_RESULTS: Final = 10
"""Results of an operator that are shown; ``fanfold results`` has all."""
_MOST_TEXT: Final = 400
"""Characters of a statement that are shown."""
_INDENT: Final = 2


def show_pipeline_findings(state: PipelineState, simulated: bool, console: Console) -> None:
    """Print what each finished stage has found.

    Raises:
        JournalError: A file of a stage is damaged.
    """
    for stage in state.stages:
        if stage.state == "finished":
            _show_stage(stage, simulated, console)


def _show_stage(stage: StageState, simulated: bool, console: Console) -> None:
    aggregate = read_aggregate(stage.stage.folder)
    operator = stage.stage.config.operator
    list_results = None if operator is None else _RESULTS.get(operator.op)
    if not aggregate and list_results is None:
        return
    mark = "   simulated: true" if simulated else ""
    head = stage.stage.name if operator is None else f"{stage.stage.name} ({operator.op})"
    console.print(Text(f"stage {head}{mark}", style="bold"))
    show_aggregate(aggregate, simulated=False, console=console)
    if list_results is None:
        return
    with open_result_source(stage.stage.folder) as source:
        rows = list(islice(source.iter_rows(), _MOST_RESULTS))
        total = len(source.store)
    for part in list_results(rows, console.width):
        console.print(part)
    if total > len(rows):
        folder = stage.stage.folder.path
        command = f"fanfold results {shlex.quote(str(folder.parent.parent))}"
        more = f"the first {len(rows):,} of {total:,} results; all with:"
        console.print(Text(f"{more} {command} --stage {stage.stage.name}"), soft_wrap=True)


def _list_summaries(rows: Sequence[ResultRow], _width: int) -> Iterator[RenderableType]:
    """Yield each summary: its name, and its statements with the ids that they are based on."""
    for row in rows:
        name = format_cell(row["id"], None).plain
        output = row.get("output")
        if not isinstance(output, Mapping):
            yield Text(f"{name}: failed: {format_cell(row.get('error'), _MOST_TEXT).plain}")
            continue
        facts = [count_nouns(output["items"], "item")]
        facts += (
            [f"{count_nouns(len(output['failed']), 'question')} failed"] if output["failed"] else []
        )
        yield Text(f"{name}: {', '.join(facts)}")
        statements = Table.grid(padding=(0, 1, 0, 0))
        for statement in output["statements"]:
            statements.add_row("-", _format_statement(statement))
        yield Padding(statements, (0, 0, 0, _INDENT), expand=False)


def _format_statement(statement: Mapping[str, Any]) -> Text:
    """Return a statement with some of its sources."""
    text = format_cell(statement["text"], _MOST_TEXT).plain
    shown = [format_cell(name).plain for name in statement["ids"]]
    more = len(statement["sources"]) - len(shown)
    shown += [f"and {more:,} more"] if more > 0 else []
    return Text(text + (f" [{', '.join(shown)}]" if shown else ""))


def _list_ranks(rows: Sequence[ResultRow], width: int) -> Iterator[RenderableType]:
    """Yield the ranking; rank and id are never shortened."""
    outputs = [one if isinstance(one := row.get("output"), Mapping) else {} for row in rows]
    names = ["reason", "wins", "comparisons", "tied"]
    names += ["flagged"] if any(output.get("flagged") for output in outputs) else []
    yield from make_table(
        [
            Column("rank", [output.get("rank") for output in outputs], is_key=True, is_number=True),
            Column("id", [row["id"] for row in rows], is_key=True),
            *(
                Column(
                    name,
                    [output.get(name) for output in outputs],
                    is_number=name not in {"reason", "flagged"},
                )
                for name in names
                if any(output.get(name) is not None for output in outputs)
            ),
        ],
        width,
    )


_List: TypeAlias = Callable[[Sequence[ResultRow], int], Iterator[RenderableType]]

_RESULTS: Final[Mapping[str, _List]] = {"summarize": _list_summaries, "rank": _list_ranks}
"""By the name of the operator; results of the others are items for the next stage."""
