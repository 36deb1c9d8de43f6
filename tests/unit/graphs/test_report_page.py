"""Parts of ``report.html``: flags, the rows that are chosen, pictures, texts, findings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.fields import FieldPath
from fanfold.backends.storage.results_schema import INPUT_ROW, ResultRow
from fanfold.graphs.report import flags as flags_module
from fanfold.graphs.report.charts import Charts, clean_svg, load_charts
from fanfold.graphs.report.evaluation import make_evaluations
from fanfold.graphs.report.findings import FindingMaker
from fanfold.graphs.report.flags import FLAGS, RowFacts, is_repetitive
from fanfold.graphs.report.molecules import open_drawing
from fanfold.graphs.report.operators import make_operator_findings
from fanfold.graphs.report.rows import TableColumn
from fanfold.graphs.report.texts import MOST_CHARACTERS, has_long_word, shorten, shorten_json
from fanfold.graphs.report.timeline import (
    list_points,
    make_heat_map,
    measure_time_use,
    read_timeline,
)

EVIL = "</script><img src=x onerror=alert(1)>\u202e\x00javascript:alert(1)"


@pytest.fixture(scope="module")
def charts() -> Charts:
    pytest.importorskip("altair", reason="charts need the extra 'report'")
    found = load_charts()
    assert found is not None
    return found


def names(bits: int) -> set[str]:
    return {name for n, name in enumerate(FLAGS) if bits >> n & 1}


def row(**given: Any) -> dict[str, Any]:
    return {"status": "done", "output": {"score": 1}, "row": {}, "attempts": 1, **given}


def test_each_flag_has_its_cause() -> None:
    facts = RowFacts()
    rows = [
        row(question="a", latency_s=1.0),
        row(question="a", latency_s=1.1),
        row(status="failed", error_class="TruncatedAnswerError", latency_s=1.0),
        row(status="failed", error_class="RefusedAnswerError", latency_s=1.0),
        row(repairs=1, latency_s=1.0),
        row(pieces=[{"start": 0, "end": 9}, {"start": 8, "end": 20}], latency_s=1.0),
        row(reasoning="wait, no. " * 100, latency_s=1.0),
        row(output={"parts": [{"text": "so " * 400}]}, latency_s=1.0),
        *[row(question=f"q{n}", latency_s=1 + n / 100) for n in range(20)],
        row(latency_s=30.0),
        row(latency_s=40.0, attempts=0),
    ]
    for one in rows:
        facts.add(one)
    facts.mark_slow()
    found = [names(bits) for bits in facts.flags]
    assert found[:8] == [
        set(),
        {"duplicate"},
        {"truncated"},
        {"refused"},
        {"repaired"},
        {"in pieces"},
        {"repetitive"},
        {"repetitive"},
    ]
    assert found[-2:] == [{"slow"}, set()]  # an item that asked nothing is not slow
    assert not any(found[8:-2])
    assert facts.count_flags() == {
        "truncated": 1,
        "refused": 1,
        "repaired": 1,
        "in pieces": 1,
        "repetitive": 2,
        "duplicate": 1,
        "slow": 1,
    }


def test_ordinary_texts_are_not_repetitive() -> None:
    text = json.dumps([{"name": f"assay {n}", "value": n * 7 % 13, "unit": "nM"} for n in range(9)])
    assert not is_repetitive(text)
    assert not is_repetitive("ab" * 20)


def test_a_table_that_is_too_small_has_failed_flagged_extreme_and_random_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"MOST_ROWS": 60, "_MOST_FAILED": 5, "_MOST_FLAGGED": 5, "_MOST_ENDS": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(flags_module, name, value)
    facts = RowFacts(FieldPath.parse("score"))
    for n in range(500):
        failed = n in {3, 400}
        facts.add(
            row(
                status="failed" if failed else "done",
                repairs=int(n in {7, 300}),
                output=None if failed else {"score": n / 10},
            )
        )
    chosen, words = facts.choose()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 60
    assert {3, 400, 7, 300, *range(3), *range(490, 500)} <= set(chosen)
    assert words[:3] == ["all 2 failed", "all 2 flagged", "the 10 lowest and highest by score"]
    assert words[3].startswith("a random sample of ")
    assert facts.choose() == (chosen, words)  # the same run gives the same page


def test_long_texts_have_their_length_and_control_characters_are_spelled_out() -> None:
    assert shorten("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    assert shorten("x" * 1_000_000) == "x" * MOST_CHARACTERS + "… (1,000,000 characters)"
    assert shorten("a\x00\u202eb") == "a\\x00\\u202eb"
    assert shorten("a", "17,000 bytes") == "a… (17,000 bytes)"
    deep: Any = "end"
    for _ in range(60):
        deep = {"k": [deep]}
    found = shorten_json({"deep": deep, "list": list(range(5_000)), "n": 1.5, EVIL: None})
    assert len(json.dumps(found)) < 5_000
    assert found["n"] == 1.5
    assert found["list"][-1] == "… 4,800 more"


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9px" height="9" viewBox="0 0 9 9">{}</svg>'


@pytest.mark.parametrize(
    "part",
    [
        "<script>alert(1)</script>",
        '<a href="javascript:alert(1)"><path d="M0 0"/></a>',
        '<foreignObject><p xmlns="http://www.w3.org/1999/xhtml">x</p></foreignObject>',
        "<style>@import 'x'</style>",
        '<image href="http://x/y.png"/>',
    ],
)
def test_a_picture_keeps_shapes_and_texts_only(part: str) -> None:
    safe = '<path d="M0 0h9" onclick="x()" style="fill:none;stroke:#000"/>'
    found = clean_svg(SVG.format(safe + part), EVIL)
    kept = '<path d="M0 0h9" fill="none" stroke="#000" />'
    assert found.count("<") == 3
    assert kept in found
    assert 'width="9" height="9"' in found


def test_a_picture_refers_to_nothing() -> None:
    found = clean_svg(SVG.format('<rect fill="URL(http://x)" width="3"/>'), "x")
    assert 'rect width="3"' in found
    assert "http" not in found
    for text in ("<p>x</p>", "<svg", SVG.format("\x00")):
        with pytest.raises(ValueError, match="picture"):
            clean_svg(text, "x")


def test_hostile_labels_stay_text_in_charts(charts: Charts) -> None:
    found = charts.draw_counts([(EVIL, 3), (EVIL + "2", 2), ("", 1)], EVIL)
    assert "<img" not in found
    assert "<script" not in found
    assert "\u202e" not in found
    assert "&lt;/script&gt;&lt;img" in found
    assert "(blank)" in found
    assert found.count("3  (50.0%)") == 1


def test_molecules_are_drawn_within_limits() -> None:
    pytest.importorskip("rdkit", reason="drawing SMILES needs the extra 'chem'")
    with open_drawing() as draw:
        assert draw is not None
        drawing = draw("CCO")
        assert drawing is not None
        assert "<path" in drawing
        assert "style=" not in drawing
        for other in ("no smiles", "", None, 7, "C" * 5_000, EVIL):
            assert draw(other) is None


AGGREGATE: list[Mapping[str, Any]] = [
    {"op": "count", "done": 5, "failed": 1, "failed_by_class": {EVIL: 1}},
    {
        "op": "top_k",
        "field": "score",
        "order": "largest",
        "missing": 2,
        "rows": [
            {
                "rank": 1,
                "id": "a",
                "value": 0.5,
                "output": {"score": 0.5, "why": EVIL},
                "show": {"smiles": "CCO"},
            }
        ],
    },
    {"op": "histogram", "field": "kind", "counts": [{"value": EVIL, "count": 3}], "missing": 0},
    {
        "op": "histogram",
        "field": "x",
        "bins": [{"low": 0, "high": 1, "count": 3}],
        "under": 1,
        "over": 2,
        "missing": 0,
    },
    {
        "op": "stats",
        "field": "x",
        "count": 0,
        "mean": None,
        "sd": None,
        "min": None,
        "max": None,
        "quantiles": {"0.5": None},
        "note": None,
        "missing": 3,
    },
    {"op": "collect", "field": None, "rows": [{"id": "a", "output": {"x": [1, {"y": None}]}}]},
    {
        "op": "stats",
        "field": "x",
        "group_by": "kind",
        "groups": [
            {"group": EVIL, "size": 5, "mean": 2.0, "quantiles": {"0.25": 1, "0.5": 2, "0.75": 3}},
            {"group": None, "size": 1, "mean": None, "quantiles": {"0.5": None}},
        ],
        "others": 7,
        "other_groups": 2,
    },
    {
        "op": "top_k",
        "field": "x",
        "order": "largest",
        "group_by": "kind",
        "groups": [{"group": 1, "size": 5, "rows": [{"rank": 1, "id": "a", "value": 3}]}],
    },
    {
        "op": "histogram",
        "field": "x",
        "group_by": "kind",
        "groups": [{"group": True, "size": 5, "counts": [{"value": "v", "count": 4}]}],
    },
    {"op": "of a later version", "groups": [{"key": "a", "values": {"n": 3}}]},
]


@pytest.mark.parametrize("is_drawn", [True, False])
def test_every_aggregator_is_a_finding(charts: Charts, is_drawn: bool) -> None:
    with open_drawing() as draw:
        maker = FindingMaker(charts if is_drawn else None, draw if is_drawn else None)
        found = list(maker.make(AGGREGATE))
    assert [one.title for one in found] == [
        "Highest score",
        "Highest x by kind",
        "Distribution of kind",
        "Distribution of x",
        "Statistics of x",
        "All answers",
        "Statistics of x by kind",
        "Distribution of x by kind",
        "Of a later version",
        "Counts",
    ]
    assert found[0].note == "2 items without a usable value"
    assert list(found[0].head) == ["rank", "id", "score", "smiles", "why"]
    titles = [one.title for one in found]
    bins = found[titles.index("Distribution of x")]
    assert bins.note.startswith("3 outside the bins")
    groups = found[titles.index("Statistics of x by kind")]
    assert list(groups.head)[:3] == ["group", "size", "mean"]
    assert list(groups.rows[1])[1:3] == ["1", "\u2013"]
    assert groups.note.startswith("7 items in 2 smaller groups not shown")
    assert "<img" not in str(groups.svg)
    later = found[titles.index("Of a later version")]
    assert ["groups 1 values n", "3"] in [list(line) for line in later.rows]
    drawn = [one.title for one in found if one.svg is not None]
    pictures = ["Distribution of kind", "Distribution of x", "Statistics of x by kind"]
    assert drawn == (pictures if is_drawn else [])


def test_statistics_are_one_line_and_agreement_is_a_table_of_the_fields() -> None:
    quantiles = {"0.25": 1.0, "0.5": 2.0, "0.75": 3.0}
    stats = {"op": "stats", "field": "x", "count": 3, "mean": 2.5, "sd": None, "min": 1, "max": 4}
    votes = {
        "op": "agreement",
        "rows": 20,
        "without_answer": 1,
        "agreement": {"kind": 0.5, "x": 1.0},
        "ties": {"kind": 2, "x": 0},
    }
    found = list(FindingMaker(None, None).make([stats | {"quantiles": quantiles}, votes]))
    assert found[0].note == "mean 2.5, median 2, min 1, max 4"
    assert ["quantile 0.75", "3"] in [list(line) for line in found[0].rows]
    assert found[1].note == "20 rows, 1 without answer"
    assert list(found[1].head) == ["field", "agreement", "ties"]
    assert [list(line) for line in found[1].rows] == [["kind", "0.5", "2"], ["x", "1", "0"]]


def test_a_ranking_says_what_was_compared_and_why() -> None:
    rows: list[ResultRow] = [
        {
            "id": f"CHEMBL{n:020}",
            "output": {"rank": n, "wins": 1 / n, "reason": f"because {n}", "flagged": False},
            INPUT_ROW: {"smiles": "CCO", "score": {"log_s": -n}},
        }
        for n in range(1, 21)
    ]
    operator = {"op": "rank", "text": "{smiles} at {score.log_s}"}
    with open_drawing() as draw:
        maker = FindingMaker(None, draw)
        found, facts = make_operator_findings({"op": "rank", "items": 99}, rows, maker, operator)
    assert list(found.head) == ["rank", "id", "text", "reason", "wins"]  # nothing is flagged
    assert list(found.rows[1]) == ["2", rows[1]["id"], "CCO at -2", "because 2", "0.5"]
    assert [(card.rank, card.reason) for card in found.cards[:2]] == [
        (1, "because 1"),
        (2, "because 2"),
    ]
    assert len(found.rows) > len(found.cards) > 0
    assert ["items", "99"] in [list(line) for line in facts.rows]


def test_a_table_breaks_words_that_no_column_can_hold() -> None:
    assert not has_long_word("measurement of 1,000 samples, each of them twice or three times")
    assert has_long_word('{"name":"noise","value":26.6109,"unit":"mV"}')


def test_queries_and_functions_are_tables() -> None:
    aggregate: list[dict[str, Any]] = [
        {"op": "sql", "query": "SELECT 1", "columns": [], "rows": [{"n": 1}], "more": True},
        {"op": "python", "function": "a:b", "result": [{"x": 1}, {"y": EVIL}]},
        {"op": "python", "function": "a:b", "result": {"x": 1}},
        {"op": "sql", "query": "SELECT", "error": "boom"},
    ]
    found = list(FindingMaker(None, None).make(aggregate))
    assert list(found[0].head) == ["n"]
    assert list(found[1].head) == ["x", "y"]
    assert found[0].note == "the first rows"
    assert "boom" in [cell for row in found[3].rows for cell in row]


def make_timeline(path: Path, rows: list[dict[str, Any]]) -> Path:
    kinds: list[tuple[str, pa.DataType]] = [
        ("start", pa.timestamp("ms", "UTC")),
        ("seconds", pa.float64()),
        ("endpoint", pa.dictionary(pa.int32(), pa.string())),
        ("calls", pa.int64()),
        ("failures", pa.map_(pa.string(), pa.int64())),
        ("in_flight", pa.float64()),
        ("input_tokens", pa.int64()),
        ("output_tokens", pa.int64()),
    ]
    schema = pa.schema(kinds)
    given = {"failures": [], "input_tokens": 2, "output_tokens": 1, "seconds": 1.0}
    table = pa.Table.from_pylist([given | row for row in rows], schema=schema)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    return path


BEGUN = datetime(2026, 3, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGUN + timedelta(seconds=seconds)


def test_where_the_time_went_adds_up(tmp_path: Path) -> None:
    levels = [10.0] * 20 + [5.0] * 2 + [10.0] * 8 + [2.0] * 10
    rows: list[dict[str, Any]] = [
        {"start": at(2 + n), "endpoint": name, "calls": 4, "in_flight": level / 2}
        for n, level in enumerate(levels)
        for name in ("a", "b")
    ]
    rows[0]["failures"] = [("EndpointLostError", 4)]
    timeline = read_timeline(make_timeline(tmp_path / "t.arrow", rows))
    assert timeline is not None
    assert timeline.failures == {"EndpointLostError": 4}
    assert [one.in_flight for one in timeline.bins] == levels
    use = measure_time_use(timeline, [(at(0), at(45))])
    assert use is not None
    assert use.level == 10
    assert use.actual == pytest.approx(45)
    assert use.parts == pytest.approx(
        {
            "useful requests": 27.5 + 1 + 2,
            "failed requests": 0.5,
            "start": 2,
            "free slots": 1,
            "tail": 8,
            "end": 3,
        }
    )
    assert use.share == pytest.approx(30.5 / 45)
    killed = measure_time_use(timeline, [(at(0), None)])
    assert killed is not None
    assert killed.actual == pytest.approx(42)
    assert killed.parts["end"] == 0


def test_the_heat_map_has_bounds_and_keeps_the_load(tmp_path: Path) -> None:
    rows = [
        {"start": at(3 * n), "seconds": 3.0, "endpoint": f"n{one}", "calls": 3, "in_flight": 1.0}
        for n in range(250)
        for one in range(300)
    ]
    timeline = read_timeline(make_timeline(tmp_path / "t.arrow", rows))
    assert timeline is not None
    heat = make_heat_map(timeline)
    columns, lines = {cell[0] for cell in heat.cells}, {cell[1] for cell in heat.cells}
    assert (len(columns), len(lines), len(heat.names)) == (200, 100, 100)
    assert heat.names[0] == "n0 \u2026 n2"
    assert all(level == pytest.approx(1) for _, _, level, _ in heat.cells)


def test_a_pause_between_sessions_takes_no_room(tmp_path: Path) -> None:
    starts = [0, 1, 2, 100_000, 100_001]
    rows = [{"start": at(n), "endpoint": "a", "calls": 1, "in_flight": 1.0} for n in starts]
    timeline = read_timeline(make_timeline(tmp_path / "t.arrow", rows))
    assert timeline is not None
    points, pauses, unit = list_points(timeline)
    assert (pauses, unit) == ([3.0], "seconds")
    assert points[-1]["at"] == 5.0


def test_a_timeline_that_is_missing_empty_or_damaged(tmp_path: Path) -> None:
    assert read_timeline(tmp_path / "none") is None
    assert read_timeline(make_timeline(tmp_path / "empty", [])) is None
    (tmp_path / "bad").write_bytes(b"no arrow")
    with pytest.raises(JournalError, match="bad: cannot be read"):
        read_timeline(tmp_path / "bad")


EVALUATION: dict[str, Any] = {
    "version": 1,
    "evaluations": [
        {
            "gold": "label",
            "field": EVIL,
            "kind": "category",
            "items": 100,
            "answered": 97,
            "missing": 3,
            "missing_by_cause": {"failed": 3},
            "metrics": {"accuracy": {"value": 0.9, "low": 0.82, "high": 0.95, "n": 100}},
            "classes": {},
            "confusion": {"labels": ["a", EVIL], "counts": [[50, 3], [7, 40]]},
        },
        {
            "gold": "y",
            "field": "x",
            "kind": "number",
            "items": 10,
            "answered": 10,
            "missing": 0,
            "metrics": {"rmse": {"value": 12.5, "low": None, "high": None, "n": 10}},
        },
    ],
}


def test_an_evaluation_has_intervals_and_a_confusion_matrix(charts: Charts) -> None:
    found = list(make_evaluations(EVALUATION["evaluations"], charts))
    assert [one.svg is not None for one in found] == [True, True, False]
    assert list(found[0].rows[0]) == ["accuracy", "0.9", "0.82 to 0.95", "100"]
    assert "3 without an answer count as missing (3 failed)" in found[0].note
    assert list(found[1].rows[0])[1:] == ["50", "3"]
    assert "<img" not in str(found[1].svg)
    assert list(found[2].rows[0])[1:3] == ["12.5", "\u2013"]


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (["336.10", "-2", "1e-3", "", None, ".5"], [336.1, -2, 0.001, None, None, 0.5]),
        (["1", "007"], None),
        (["1", "nan"], None),
        (["1", "1e999"], None),
        (["1", "e5"], None),
        (["1", "-"], None),
        (["", None], None),
    ],
)
def test_numbers_of_a_file_without_types(values: list[Any], numbers: list[Any] | None) -> None:
    column = TableColumn("x", "input", pa.string(), values).to_json()
    assert (column["values"] if column["kind"] == "number" else None) == numbers
    assert TableColumn("x", "answer", pa.string(), values).to_json()["kind"] != "number"


def test_lists_of_objects_are_read_as_lists() -> None:
    statements = [
        {"text": "Water\x1b[2J boils", "ids": ["a", "b", "c", "d"], "note": None},
        {"text": "<b>Ice</b> melts", "ids": ["e"], "at": {"page": 3}},
        {"text": "", "ids": []},
        *({"score": n} for n in range(7)),
    ]
    column = TableColumn("found", "output", pa.list_(pa.string()), [statements, [], [1]])
    found = column.to_json()["values"]
    assert found == [
        "Water\\x1b[2J boils (ids: a, b, c and 1 more) | <b>Ice</b> melts (ids: e; at: "
        '{"page":3}) | {"text":"","ids":[]} | score: 0 | score: 1 | 5 more',
        "[]",
        "[1]",
    ]


def test_texts_do_not_look_like_other_groups_and_values() -> None:
    counts = [{"value": 1, "count": 30}, {"value": "1", "count": 20}]
    groups = [{"group": 2, "size": 50, "counts": counts}, {"group": "2", "size": 0, "counts": []}]
    head: dict[str, Any] = {"op": "histogram", "field": "x"}
    entries = [{**head, "counts": counts}, {**head, "group_by": "kind", "groups": groups}]
    plain, grouped = FindingMaker(None, None).make(entries)
    assert [list(row) for row in plain.rows] == [["1", "30"], ['"1"', "20"]]
    assert list(grouped.head) == ["group", "size", "1", '"1"']
    assert [row[0] for row in grouped.rows] == ["2", '"2"']
