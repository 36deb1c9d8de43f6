"""``fanfold watch``: what the endpoints of a run do over time, in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ...backends.core.errors import JournalError
from ...backends.core.values import is_count
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder, get_run_ids, open_folder, read_state
from ..run.console import fill_lines, format_count, print_json
from ..run.rich_console import Terminal
from ..run.stage_folder import describe_stage, list_stage_runs
from .format import format_duration
from .tables import Column, format_cell, make_table

_REFRESH_S: Final = 2.0
_SHARE: Final = 20.0
"""Reading a run takes at most one part in so many of the time."""
_RECENT_S: Final = 60.0
"""What endpoints did is shown for this long before now while a run goes on."""
_FILLED_BINS: Final = 8
"""A longer time without requests, in bins, is shown as one column."""
_MOST_GAPS: Final = 12
_MOST_STRETCH: Final = 4
_MOST_CLASSES: Final = 5
_LEAST_ENDPOINTS: Final = 3
_MOST_ENDPOINTS: Final = 10
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_GAP: Final = "┆"


@dataclass(frozen=True, slots=True)
class _Bin:
    """What all endpoints did in one bin of the timeline."""

    start_ms: int
    calls: int = 0
    failed: int = 0
    in_flight: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    latency_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class _EndpointActivity:
    """What one endpoint did; latency is None if it answered nothing."""

    endpoint: str
    calls: int
    failed: int
    in_flight: float
    tokens_per_s: float
    mean_latency_s: float | None


@dataclass(frozen=True, slots=True)
class _Activity:
    """What a timeline adds up to.

    Attributes:
        width_s: Width of a bin.
        bins: All bins with something in them, in order.
        failures: Failed requests by error class, most frequent first.
        recent_failures: The same in the last minute of the timeline.
        endpoints: All endpoints over the time that is asked for: the highest share of failures
            first, then the slowest.
        seconds: The time that the figures of endpoints are for.
    """

    width_s: float
    bins: list[_Bin]
    failures: dict[str, int]
    recent_failures: dict[str, int]
    endpoints: list[_EndpointActivity]
    seconds: float


_NOTHING: Final = _Activity(1.0, [], {}, {}, [], 0.0)


@dataclass(frozen=True, slots=True)
class _RunView:
    """A run at one moment."""

    folder: str
    stage: str | None
    name: str
    state: str
    model: str
    simulated: bool | None
    items: int
    done: int
    failed: int
    activity: _Activity

    @property
    def is_running(self) -> bool:
        return self.state == "running"


def watch_run(path: Path, as_json: bool) -> None:
    """Show what the endpoints of a run do over time, until it ends or Ctrl-C.

    A run that no process works on is shown once; so is any run if standard output is no terminal.

    Of a pipeline, the stage or level that was begun last is shown.

    Raises:
        ConfigurationError: The folder is no run folder.
        JournalError: The timeline or the journal is damaged.
    """
    folder, console = open_folder(path), Terminal()
    with _ItemCounter() as counter:
        if as_json:
            print_json(_to_json(_read_view(folder, counter)))
        elif not console.is_terminal or console.is_dumb_terminal:
            console.print(_render(_read_view(folder, counter), console.width, None))
        else:
            _follow(folder, counter, console)


class _ItemCounter:
    """Counts the ended items of a run again and again; reads only what its journal has gained."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            self._journal.close()

    def count(self, folder: RunFolder, about: Mapping[str, Any]) -> tuple[int, int]:
        """Return the items done and failed; blocks.

        A session notes them at its end. While it runs, or after a kill, only the journal has them.

        Raises:
            JournalError: The journal is damaged.
        """
        last = about["sessions"][-1] if about["sessions"] else {}
        if is_count(last.get("done")) and is_count(last.get("failed")) and not folder.is_in_use():
            return last["done"], last["failed"]
        if self._journal is None or self._path != folder.path:
            self.__exit__()
            ids, items = get_run_ids(about), int(about["input"]["items"])
            live = folder.is_in_use()
            self._journal = Journal(folder.journal, ids, items, live=live)
            self._path = folder.path
        else:
            self._journal.follow()
        counts = self._journal.count_items()
        return counts.done, counts.failed


def _follow(folder: RunFolder, counter: _ItemCounter, console: Console) -> None:
    """Show a run again and again until it ends or the user interrupts."""
    try:
        with Live(console=console, auto_refresh=False) as live:
            took = 0.0  # the first reading, of all there is, does not count
            view = _read_view(folder, counter)
            while True:
                height = console.height if view.is_running else None
                live.update(_render(view, console.width, height), refresh=True)
                if not view.is_running:
                    return
                time.sleep(max(_REFRESH_S, _SHARE * took))
                began = time.monotonic()
                view = _read_view(folder, counter)
                took = time.monotonic() - began
    except KeyboardInterrupt:  # the way to leave; the run goes on
        return


def _read_view(folder: RunFolder, counter: _ItemCounter) -> _RunView:
    stage, state = None, str(read_state(folder, folder.read_provenance()))
    if folder.is_pipeline and (runs := list_stage_runs(folder)):
        folder, shown = runs[-1], folder.path
        stage = describe_stage(folder)
    else:
        shown = folder.path
    about = folder.read_provenance()
    done, failed = counter.count(folder, about)
    return _RunView(
        folder=str(shown),
        stage=stage,
        name=str(about["name"]),
        state=state,
        model=str(about["model"]),
        simulated=about["simulated"],
        items=int(about["input"]["items"]),
        done=done,
        failed=failed,
        activity=_read_activity(folder, recent=state == "running"),
    )


def _read_activity(folder: RunFolder, recent: bool) -> _Activity:
    """Add up the timeline of a run; blocks.

    Args:
        folder: The run's folder.
        recent: Whether the figures of endpoints are for the last minute only.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from ...backends.storage.timeline import (
        FILE_NAME,
        list_failures,
        read_timeline,
    )

    path = folder.path / FILE_NAME
    try:
        table = read_timeline(path)
    except JournalError:
        if path.exists():
            raise
        return _NOTHING
    if not table.num_rows:
        return _NOTHING
    width_s = table["seconds"][0].as_py()
    failures = list_failures(table)
    table = table.drop_columns(["failures"])
    sums = ("calls", "in_flight", "input_tokens", "output_tokens", "latency_s")
    failed = _add_up(failures, "start", ["count"])
    starts = [
        _Bin(start_ms=start, failed=failed.get(start, (0,))[0], **dict(zip(sums, row, strict=True)))
        for start, row in sorted(_add_up(table, "start", sums).items())
    ]
    since = starts[-1].start_ms + 1000 * width_s - 1000 * max(_RECENT_S, width_s)
    late = pa.scalar(since).cast(pa.int64()).cast(table["start"].type)
    late_failures = failures.filter(pc.greater_equal(failures["start"], late))
    of_endpoints = table.filter(pc.greater_equal(table["start"], late)) if recent else table
    bad = _add_up(late_failures if recent else failures, "endpoint", ["count"])
    bins = pc.count_distinct(of_endpoints["start"]).as_py()
    seconds = bins * width_s
    endpoints = [
        _EndpointActivity(
            endpoint=name,
            calls=calls,
            failed=(wrong := bad.get(name, (0,))[0]),
            in_flight=flying / bins,
            tokens_per_s=(prompt + completion) / seconds,
            mean_latency_s=latency / (calls - wrong) if calls > wrong else None,
        )
        for name, (calls, flying, prompt, completion, latency) in _add_up(
            of_endpoints, "endpoint", sums
        ).items()
    ]
    endpoints.sort(key=_badness)
    return _Activity(
        width_s=width_s,
        bins=starts,
        failures=_rank(_add_up(failures, "class", ["count"])),
        recent_failures=_rank(_add_up(late_failures, "class", ["count"])),
        endpoints=endpoints,
        seconds=seconds,
    )


def _add_up(table: Any, key: str, sums: Sequence[str]) -> dict[Any, tuple[Any, ...]]:
    """Return the sums of some columns by the values of a column; times as ms since 1970."""
    import pyarrow as pa

    column = table[key]
    keys = column.cast(pa.int64() if key == "start" else pa.string())
    flat = pa.table({"key": keys, **{name: table[name] for name in sums}})
    grouped = flat.group_by("key", use_threads=False).aggregate([(name, "sum") for name in sums])
    columns = [grouped[f"{name}_sum"].to_pylist() for name in sums]
    return dict(zip(grouped["key"].to_pylist(), zip(*columns, strict=True), strict=True))


def _rank(counts: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return dict(sorted(((n, c[0]) for n, c in counts.items()), key=lambda one: (-one[1], one[0])))


def _badness(one: _EndpointActivity) -> tuple[float, float, str]:
    share = one.failed / one.calls if one.calls else 0.0
    return -share, -(one.mean_latency_s or 0.0), one.endpoint


def _to_json(view: _RunView) -> dict[str, Any]:
    """Return all that is shown, and every bin, as plain data."""
    activity = view.activity
    facts = {name: getattr(view, name) for name in _RunView.__slots__ if name != "activity"}
    return facts | {
        "bin_seconds": activity.width_s,
        "bins": [
            {"start": _iso(one.start_ms)}
            | {key: value for key, value in asdict(one).items() if key != "start_ms"}
            for one in activity.bins
        ],
        "failures": activity.failures,
        "recent_failures": activity.recent_failures,
        "endpoints": activity.endpoints,
        "endpoints_seconds": activity.seconds,
    }


def _iso(ms: float) -> str:
    time_ = datetime.fromtimestamp(ms / 1000, UTC)
    return time_.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- screen -------------------------------------------------------------------------------


def _render(view: _RunView, width: int, height: int | None) -> RenderableType:
    """Return the screen of a run.

    Args:
        view: The run.
        width: Columns of the terminal.
        height: Lines of the terminal, or None if there may be more.
    """
    activity = view.activity
    parts: list[RenderableType] = [*_head(view, width)]
    if not activity.bins:
        parts.append(Text("no request yet: the timeline is written every few seconds"))
        return Group(*parts)
    columns = _make_columns(activity, width)
    parts += _charts(view, columns, width)
    used = len(parts) + 1
    if activity.failures:
        table = [*_failure_tables(view, width)]
        parts += table
        used += min(len(activity.failures), _MOST_CLASSES) + 2
    free = _MOST_ENDPOINTS if height is None else height - used - 4
    parts += _endpoint_tables(view, width, min(max(free, _LEAST_ENDPOINTS), _MOST_ENDPOINTS))
    return Group(*parts)


def _head(view: _RunView, width: int) -> Iterator[Text]:
    words = [
        *(["SIMULATED"] if view.simulated else []),
        format_cell(view.folder, None).plain,
        *([f"stage {view.stage}"] if view.stage else []),
        format_cell(view.state, None).plain,
        f"{format_count(view.done + view.failed)}/{format_count(view.items)} items",
        *([f"{format_count(view.failed)} failed"] if view.failed else []),
        format_cell(view.model, None).plain,
    ]
    for number, line in enumerate(fill_lines(words, width)):
        yield Text(line, style="bold" if number == 0 else "")
    if not view.activity.bins:
        return
    bins = view.activity.bins
    calls, failed = sum(one.calls for one in bins), sum(one.failed for one in bins)
    tokens = [sum(one.input_tokens for one in bins), sum(one.output_tokens for one in bins)]
    facts = [
        f"{format_count(calls)} requests, {format_count(failed)} of them failed",
        f"{format_count(tokens[0])} + {format_count(tokens[1])} tokens",
        f"{format_duration(len(bins) * view.activity.width_s)} with requests",
    ]
    for line in fill_lines(facts, width):
        yield Text(line)
    yield Text("")


@dataclass(frozen=True, slots=True)
class _Columns:
    """Bins as columns of a chart: groups of bins, or None for a longer time without requests.

    Attributes:
        groups: The bins of each column, with empty ones in between.
        repeat: How many characters wide a column is.
    """

    groups: list[list[_Bin] | None]
    repeat: int


def _make_columns(activity: _Activity, width: int) -> _Columns:
    spans = _split(activity)
    if len(spans) > min(_MOST_GAPS, width // 4):  # too many gaps to show them
        spans = [[one for span in spans for one in span]]
    group = 1
    while sum(-(-len(span) // group) for span in spans) + len(spans) - 1 > width:
        group += 1
    groups: list[list[_Bin] | None] = []
    for span in spans:
        groups += [None] if groups else []
        groups += [span[at : at + group] for at in range(0, len(span), group)]
    return _Columns(groups, min(max(1, width // len(groups)), _MOST_STRETCH))


def _split(activity: _Activity) -> list[list[_Bin]]:
    """Return the bins in spans, with the empty bins of short pauses, and without long pauses."""
    step = round(1000 * activity.width_s)
    spans = [[activity.bins[0]]]
    for before, one in pairwise(activity.bins):
        missing = (one.start_ms - before.start_ms) // step - 1
        if missing > _FILLED_BINS:
            spans.append([one])
            continue
        empty = range(before.start_ms + step, one.start_ms, step)
        spans[-1] += [*(_Bin(start) for start in empty), one]
    return spans


def _charts(view: _RunView, columns: _Columns, width: int) -> Iterator[Text]:
    per_s = 1 / view.activity.width_s
    charts: list[tuple[str, int, str, str, float]] = [
        ("requests per second", 3, "", "calls", per_s),
        ("in flight", 2, "", "in_flight", 1.0),
        ("tokens per second", 2, "", "tokens", per_s),
        ("failed requests per second", 1, "red", "failed", per_s),
    ]
    for name, lines, style, field, scale in charts:
        if field == "failed" and not view.activity.failures:
            continue
        values = [_mean(group, field, scale) for group in columns.groups]
        yield Text.assemble((name, f"bold {style}".strip()), "  ", _figures(view, values, field))
        for line in _draw(values, lines, columns.repeat):
            yield Text(line, style=style)
    yield Text(_axis(view.activity, columns, width))
    yield Text("")


def _mean(group: Sequence[_Bin] | None, field: str, scale: float) -> float | None:
    if group is None:
        return None
    total: float = sum(getattr(one, field) for one in group)
    return scale * total / len(group)


def _figures(view: _RunView, values: Sequence[float | None], field: str) -> str:
    """Return the latest value of a running run, the mean and the peak."""
    bins, width_s = view.activity.bins, view.activity.width_s
    scale = 1.0 if field == "in_flight" else 1 / width_s
    mean = scale * sum(getattr(one, field) for one in bins) / len(bins)
    words = [f"mean {_short(mean)}", f"peak {_short(max(v for v in values if v is not None))}"]
    if view.is_running:
        end_ms = bins[-1].start_ms + 1000 * width_s
        span_ms = 1000 * max(10.0, width_s)
        late = [one for one in bins if one.start_ms >= end_ms - span_ms]
        total = sum(getattr(one, field) for one in late)
        now = scale * total * width_s / (span_ms / 1000)
        words.insert(0, f"now {_short(now)}")
    return "  ".join(words)


def _short(value: float) -> str:
    return f"{value:.2g}" if 0 < value < 10 else format_count(value)  # noqa: PLR2004 - two digits


def _draw(values: Sequence[float | None], lines: int, repeat: int) -> Iterator[str]:
    """Yield the lines of a chart, the highest first."""
    peak = max((value for value in values if value is not None), default=0.0) or 1.0
    steps = len(_BLOCKS) - 1
    heights = [
        None if value is None else max(round(value / peak * lines * steps), 1 if value else 0)
        for value in values
    ]
    for line in reversed(range(lines)):
        yield "".join(
            _GAP if height is None else repeat * _BLOCKS[min(max(height - line * steps, 0), steps)]
            for height in heights
        ).rstrip()


def _axis(activity: _Activity, columns: _Columns, width: int) -> str:
    """Return the times at which the charts begin and end, and how long a column is."""
    first = datetime.fromtimestamp(activity.bins[0].start_ms / 1000, UTC)
    last = datetime.fromtimestamp(activity.bins[-1].start_ms / 1000 + activity.width_s, UTC)
    form = "%H:%M:%S" if first.date() == last.date() else "%m-%d %H:%M"
    begin, end = f"{first:{form}}", f"{last:{form}} UTC"
    drawn = sum(1 if group is None else columns.repeat for group in columns.groups)
    bins = max(len(group) for group in columns.groups if group is not None)
    unit = "column" if columns.repeat == 1 else "bar"
    scale = f"{format_duration(bins * activity.width_s)} a {unit}"
    gaps = f", {_GAP} no requests" if None in columns.groups else ""
    room = max(drawn, len(begin) + len(end) + len(scale) + len(gaps) + 6)
    line = f"{begin}  {scale}{gaps}  ".ljust(min(room, width) - len(end)) + end
    return line if len(line) <= width else f"{begin} to {end}"


def _failure_tables(view: _RunView, width: int) -> Iterator[RenderableType]:
    activity = view.activity
    calls = sum(one.calls for one in activity.bins)
    shown = list(activity.failures.items())[:_MOST_CLASSES]
    names, counts = [name for name, _ in shown], [count for _, count in shown]
    late = [activity.recent_failures.get(name, 0) for name in names]
    if rest := sum(activity.failures.values()) - sum(counts):
        names, counts = [*names, "others"], [*counts, rest]
        late.append(sum(activity.recent_failures.values()) - sum(late))
    columns = [
        Column("failed requests", names, is_key=True),
        Column("count", [format_count(count) for count in counts], is_number=True),
        Column("share", [_percent(count / max(1, calls)) for count in counts], is_number=True),
    ]
    if view.is_running:
        head = f"last {format_duration(max(_RECENT_S, activity.width_s))}"
        columns.append(Column(head, [format_count(count) for count in late], is_number=True))
    yield from make_table(columns, width, framed=False)
    yield Text("")


def _endpoint_tables(view: _RunView, width: int, most: int) -> Iterator[RenderableType]:
    activity = view.activity
    shown = activity.endpoints[:most]
    columns = [
        Column("endpoint", [one.endpoint for one in shown], is_key=True),
        Column("requests", [format_count(one.calls) for one in shown], is_number=True),
        Column(
            "failed", [_percent(one.failed / max(1, one.calls)) for one in shown], is_number=True
        ),
        Column(
            "mean",
            ["-" if (s := one.mean_latency_s) is None else format_duration(s) for one in shown],
            is_number=True,
        ),
        Column("in flight", [_short(one.in_flight) for one in shown], is_number=True),
        Column("tokens/s", [_short(one.tokens_per_s) for one in shown], is_number=True),
    ]
    yield from make_table(columns, width, framed=False)
    since = f", last {format_duration(activity.seconds)}" if view.is_running else ""
    left = len(activity.endpoints) - len(shown)
    more = f"; {format_count(left)} more endpoints" if left else ""
    yield Text(f"most failures first, then the slowest{since}{more}", style="dim")


def _percent(share: float) -> str:
    return "0 %" if not share else f"{100 * share:.2g} %" if share < 0.995 else "100 %"  # noqa: PLR2004
