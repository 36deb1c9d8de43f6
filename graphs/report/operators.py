"""The results of a stage's operator, as findings: summaries and rankings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ...backends.core.terminal import count_nouns
from ...backends.storage.results_schema import INPUT_ROW, ResultRow
from .findings import Card, Finding, FindingMaker
from .texts import NONE, shorten, to_text

MOST_RESULTS: Final = 100
"""Results that are read for the findings."""
_MOST_SUMMARIES: Final = 12
_MOST_IDS: Final = 5


def make_operator_findings(
    report: Mapping[str, Any], rows: Sequence[ResultRow], maker: FindingMaker
) -> Iterator[Finding]:
    """Yield what the operator of a stage has found out.

    Args:
        report: What ``aggregate.json`` reports of it; empty if the stage has no operator.
        rows: Its first results.
        maker: Draws molecules.
    """
    if not report:
        return
    make_results = _RESULTS.get(str(report.get("op")))
    if make_results is not None:
        yield from make_results(rows, maker)
    notes = [str(line) for line in report.get("lines") or ()]
    facts = {name: value for name, value in report.items() if name not in ("op", "lines")}
    yield Finding(
        f"Operator {report.get('op')}",
        shorten("; ".join(notes)),
        head=("fact", "value"),
        rows=[(name.replace("_", " "), to_text(value)) for name, value in facts.items()],
        numbers=(False, True),
        is_open=not notes,
    )


def _make_summaries(rows: Sequence[ResultRow], _maker: FindingMaker) -> Iterator[Finding]:
    for row in rows[:_MOST_SUMMARIES]:
        title = f"Summary: {shorten(str(row['id']))}"
        output = row.get("output")
        if not isinstance(output, Mapping):
            yield Finding(title, f"failed: {shorten(str(row.get('error')))}")
            continue
        note = count_nouns(output["items"], "item")
        if failed := len(output["failed"]):
            note += f"; {count_nouns(failed, 'question')} failed"
        head = ("statement", "based on", "items")
        cells = [
            (shorten(str(one["text"])), _list_sources(one["sources"]), f"{len(one['sources']):,}")
            for one in output["statements"]
        ]
        yield Finding(title, note, head=head, rows=cells, numbers=(False, False, True))
    if len(rows) > _MOST_SUMMARIES:
        yield Finding("Further summaries", "all are in the table of items below")


def _list_sources(names: Sequence[Any]) -> str:
    shown = [shorten(str(name)) for name in names[:_MOST_IDS]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "") or NONE


def _make_ranking(rows: Sequence[ResultRow], maker: FindingMaker) -> Iterator[Finding]:
    cards, cells = list[Card](), list[tuple[str, ...]]()
    for row in rows:
        output = row.get("output")
        if not isinstance(output, Mapping):
            continue
        name, reason = shorten(str(row["id"])), shorten(str(output.get("reason") or NONE))
        rank, wins = int(output["rank"]), f"{output['wins']:.3g}"
        cells.append((f"{rank:,}", name, reason, wins, "yes" if output.get("flagged") else ""))
        if (svg := maker.draw_row(row.get(INPUT_ROW) or {})) is not None:
            cards.append(Card(rank, name, f"wins {wins}", svg))
    head = ("rank", "id", "reason", "wins", "flagged")
    numbers = (True, False, False, True, False)
    yield Finding("Ranking", "by the judgement of the model", None, cards, head, cells, numbers)


_Make: TypeAlias = Callable[[Sequence[ResultRow], FindingMaker], Iterator[Finding]]

_RESULTS: Final[Mapping[str, _Make]] = {"summarize": _make_summaries, "rank": _make_ranking}
"""By the name of the operator; results of the others are items for the next stage."""
