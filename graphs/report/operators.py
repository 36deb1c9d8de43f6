"""The results of a stage's operator, as findings: summaries and rankings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ...backends.core.templates import Template
from ...backends.core.terminal import count_nouns
from ...backends.storage.results_schema import INPUT_ROW, ResultRow
from .findings import Card, Finding, FindingMaker
from .texts import NONE, shorten, to_text

MOST_RESULTS: Final = 100
"""Results that are read for the findings."""
_MOST_SUMMARIES: Final = 12
_MOST_IDS: Final = 5
_MOST_DRAWN: Final = 12


def make_operator_findings(
    report: Mapping[str, Any],
    rows: Sequence[ResultRow],
    maker: FindingMaker,
    operator: Mapping[str, Any],
) -> Iterator[Finding]:
    """Yield what the operator of a stage has found out.

    Args:
        report: What ``aggregate.json`` reports of it; empty if the stage has no operator.
        rows: Its first results.
        maker: Draws molecules.
        operator: Its settings.
    """
    if not report:
        return
    make_results = _RESULTS.get(str(report.get("op")))
    if make_results is not None:
        yield from make_results(rows, maker, operator)
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


def _make_summaries(
    rows: Sequence[ResultRow], _maker: FindingMaker, _operator: Mapping[str, Any]
) -> Iterator[Finding]:
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
        numbers = (False, False, True)
        yield Finding(title, note, head=head, rows=cells, numbers=numbers, is_wide=True)
    if len(rows) > _MOST_SUMMARIES:
        yield Finding("Further summaries", "all are in the table of items below")


def _list_sources(names: Sequence[Any]) -> str:
    shown = [shorten(str(name)) for name in names[:_MOST_IDS]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "") or NONE


def _make_ranking(
    rows: Sequence[ResultRow], maker: FindingMaker, operator: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield the ranking: what was compared, and the reason of each rank."""
    text = operator.get("text")
    template = Template.parse(str(text), "reduce.text") if text else None
    cards, found = list[Card](), list[dict[str, str]]()
    for row in rows:
        output, columns = row.get("output"), row.get(INPUT_ROW) or {}
        if not isinstance(output, Mapping):
            continue
        name, reason = shorten(str(row["id"])), shorten(str(output.get("reason") or ""))
        rank, wins = int(output["rank"]), f"{output['wins']:.3g}"
        found.append(
            {
                "rank": f"{rank:,}",
                "id": name,
                "text": "" if template is None else shorten(template.render(columns)),
                "reason": reason,
                "wins": wins,
                "flagged": "yes" if output.get("flagged") else "",
            }
        )
        if len(cards) < _MOST_DRAWN and (svg := maker.draw_row(columns)) is not None:
            cards.append(Card(rank, name, f"wins {wins}", svg, reason))
    names = ("rank", "id", "text", "reason", "wins", "flagged")
    head = [name for name in names if any(cells[name] for cells in found)]
    yield Finding(
        "Ranking",
        "by the judgement of the model; wins: share of an item's comparisons that it won",
        None,
        cards,
        head,
        [[cells[name] or NONE for name in head] for cells in found],
        [name in {"rank", "wins"} for name in head],
        is_wide=True,
    )


_Make: TypeAlias = Callable[
    [Sequence[ResultRow], FindingMaker, Mapping[str, Any]], Iterator[Finding]
]

_RESULTS: Final[Mapping[str, _Make]] = {"summarize": _make_summaries, "rank": _make_ranking}
"""By the name of the operator; results of the others are items for the next stage."""
