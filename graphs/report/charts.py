"""Charts as inline SVG, drawn by Altair; colours are those of the style sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias
from xml.etree import ElementTree

from markupsafe import Markup

from .texts import shorten

INK: Final = "#1f2933"
MUTED: Final = "#66727f"
GRID: Final = "#e3e7ec"
ACCENT: Final = "#2f6f93"
FAIL: Final = "#b5413b"
"""Colours of the light theme; the style sheet replaces them, by these values, in the dark one."""

_LABEL: Final = 36
"""Characters of a label."""

_WIDE: Final = 1200
"""Width of charts over time."""

_SVG: Final = "http://www.w3.org/2000/svg"
_ELEMENTS: Final = frozenset(
    {"svg", "g", "path", "rect", "line", "circle", "ellipse", "text", "tspan", "clipPath", "defs"}
)
_ATTRIBUTES: Final = frozenset(
    {
        *("width", "height", "viewBox", "version", "transform", "d", "x", "y", "x1", "x2", "y1"),
        *("y2", "cx", "cy", "r", "rx", "ry", "dx", "dy", "fill", "fill-opacity", "fill-rule"),
        *("stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap"),
        *("stroke-linejoin", "stroke-miterlimit", "opacity", "font-size", "font-weight"),
        *("text-anchor", "dominant-baseline", "display"),
    }
)
"""Elements and attributes that charts and drawings need; the page gets no others."""

Chart: TypeAlias = Any
"""A chart of Altair, which is optional and has no types here."""


def clean_svg(text: str, label: str) -> Markup:
    """Return an SVG picture reduced to shapes and texts, safe within a page.

    Args:
        text: The picture.
        label: What it shows, for readers who cannot see it.

    Raises:
        ValueError: It is not well-formed.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"the picture is not XML: {error}") from None
    picture = _clean(root)
    if picture is None or picture.tag != "svg":
        raise ValueError("the picture is not SVG")
    picture.set("role", "img")
    picture.set("aria-label", shorten(label))
    for name in ("width", "height"):
        picture.set(name, picture.get(name, "").removesuffix("px"))
    return Markup(ElementTree.tostring(picture, encoding="unicode"))


def _clean(element: ElementTree.Element) -> ElementTree.Element | None:
    space, _, tag = element.tag.rpartition("}")
    if space not in ("", "{" + _SVG) or tag not in _ELEMENTS or element.get("display") == "none":
        return None
    style = dict[str, str]()
    for rule in (element.get("style") or "").split(";"):
        name, _, value = rule.partition(":")
        style[name.strip()] = value.strip()
    given = {**element.attrib, **style}
    kept = {
        name: value for name, value in given.items() if name in _ATTRIBUTES and _is_plain(value)
    }
    made = ElementTree.Element(tag, kept)
    made.text = element.text if tag in {"text", "tspan"} else None
    made.extend(child for child in map(_clean, element) if child is not None)
    is_empty = tag in {"g", "defs"} or (tag == "path" and not kept.get("d"))
    return None if is_empty and not len(made) else made


def _is_plain(value: str) -> bool:
    """Return True if a value refers to nothing outside itself."""
    return "url(" not in value.casefold()


def load_charts() -> Charts | None:
    """Return what draws charts; None if the extra ``report`` is not installed."""
    try:
        import altair  # noqa: PLC0415 - an optional package
        import vl_convert  # noqa: PLC0415 - an optional package
    except ImportError:
        return None
    return Charts(altair, vl_convert.vegalite_to_svg)


class Charts:
    """Draws the charts of a report."""

    def __init__(self, altair: Any, convert: Callable[[dict[str, Any]], str]) -> None:
        self._alt, self._convert = altair, convert
        self._sets = dict[str, list[Mapping[str, Any]]]()

    def _draw(self, chart: Chart, label: str) -> Markup:
        axis: dict[str, Any] = {
            "labelColor": MUTED,
            "titleColor": MUTED,
            "gridColor": GRID,
            "domainColor": GRID,
        }
        axis |= {"tickColor": GRID, "labelFontSize": 11, "titleFontSize": 11}
        axis |= {"titleFontWeight": "normal", "labelLimit": 220, "domain": False, "ticks": False}
        config = {
            "background": "transparent",
            "font": "sans-serif",
            "axis": axis | {"labelPadding": 6, "titlePadding": 8},
            "view": {"stroke": None},
            "legend": {"labelColor": MUTED, "titleColor": MUTED, "symbolType": "square"},
            "text": {"color": INK, "fontSize": 11},
            "bar": {"color": ACCENT},
        }
        spec = chart.to_dict(validate=False) | {"config": config, "datasets": self._sets}
        self._sets = {}
        return clean_svg(self._convert(spec), label)

    def _values(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return data by name: Altair would check each value against a schema."""
        name = f"rows-{len(self._sets)}"
        self._sets[name] = list(rows)
        return self._alt.NamedData(name=name)

    def draw_counts(self, counts: Sequence[tuple[str, int]], label: str) -> Markup:
        """Draw one bar per value, in the order given, with its count and share."""
        total = sum(count for _, count in counts) or 1
        rows = [(name, count, f"{count:,}  ({count / total:.1%})") for name, count in counts]
        return self.draw_bars(rows, label)

    def draw_bars(self, bars: Sequence[tuple[str, float, str]], label: str) -> Markup:
        """Draw horizontal bars, in the order given: name, length, and the text beside it."""
        alt = self._alt
        rows = [
            {"n": n, "label": _short_label(name), "length": length, "text": text}
            for n, (name, length, text) in enumerate(bars)
        ]
        # Labels are marks, not labels of the axis: two long values may look the same.
        widest = 1.35 * max(length for _, length, _ in bars) or 1
        base = alt.Chart(self._values(rows), width=300, height=24 * len(rows)).encode(
            y=alt.Y("n:O", axis=None),
            x=alt.X("length:Q", axis=None, scale=alt.Scale(domain=[0, widest])),
        )
        names = base.mark_text(align="right", dx=-8, color=INK).encode(
            text="label:N", x=alt.value(0)
        )
        marks = base.mark_bar(height=14, cornerRadiusEnd=2, color=ACCENT)
        texts = base.mark_text(align="left", dx=5, color=MUTED).encode(text="text:N")
        return self._draw(names + marks + texts, label)

    def draw_histogram(self, bins: Sequence[tuple[float, float, int]], label: str) -> Markup:
        """Draw a histogram of numbers."""
        alt = self._alt
        rows = [{"low": low, "high": high, "count": count} for low, high, count in bins]
        chart = (
            alt.Chart(self._values(rows), width=440, height=130)
            .mark_bar(color=ACCENT, binSpacing=1)
            .encode(
                x=alt.X("low:Q", bin="binned", title=None, axis=alt.Axis(grid=False, tickCount=8)),
                x2="high:Q",
                y=alt.Y("count:Q", title="items", axis=alt.Axis(tickCount=4)),
            )
        )
        return self._draw(chart, label)

    def draw_timeline(
        self, points: Sequence[Mapping[str, float]], pauses: Sequence[float], unit: str
    ) -> Markup:
        """Draw requests in flight, requests per second and tokens per second over time."""
        alt = self._alt
        source, cuts = self._values(points), self._values([{"at": one} for one in pauses])
        panels = [
            ("in_flight", "in flight", ACCENT),
            ("rate", "requests per s", ACCENT),
            ("tokens", "tokens out per s", ACCENT),
        ]
        rows = list[Chart]()
        for name, title, color in panels:
            is_last = name == panels[-1][0]
            x = alt.X(
                "at:Q",
                title=f"{unit} of work" if is_last else None,
                axis=alt.Axis(grid=False, labels=is_last, tickCount=10),
                scale=alt.Scale(nice=False, zero=True),
            )
            y = alt.Y(f"{name}:Q", title=title, axis=alt.Axis(tickCount=3))
            base = alt.Chart(source, width=_WIDE, height=84)
            area = base.mark_area(interpolate="step-after", color=color, opacity=0.85)
            layers = [area.encode(x=x, y=y)]
            if name == "rate":
                failed = base.mark_area(interpolate="step-after", color=FAIL)
                layers.append(failed.encode(x=x, y=alt.Y("failed:Q", title=title)))
            if pauses:
                layers.append(alt.Chart(cuts).mark_rule(color=MUTED, strokeDash=[3, 3]).encode(x=x))
            rows.append(alt.layer(*layers))
        chart = alt.vconcat(*rows, spacing=14)
        return self._draw(chart, "requests in flight, requests and tokens per second over time")

    def draw_heat_map(
        self,
        cells: Sequence[tuple[int, int, float, float]],
        names: Sequence[str],
        width: float,
        unit: str,
    ) -> Markup:
        """Draw the load of each endpoint over time, and where its requests failed."""
        alt, height = self._alt, max(5, min(18, 480 // max(1, len(names))))
        most = max((level for _, _, level, _ in cells), default=0.0) or 1.0
        rows = [
            {
                "x": column * width,
                "x2": (column + 1) * width,
                "y": row,
                "y2": row + (0.9 if height >= 10 else 1),  # noqa: PLR2004 - room for a gap
                "level": level / most,
                "failed": failed,
            }
            for column, row, level, failed in cells
        ]
        every = -(-len(names) // 30)
        labels = [
            {"y": n + 0.45, "name": _short_label(name)}
            for n, name in enumerate(names)
            if n % every == 0
        ]
        y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[len(names), 0], nice=False))
        x = alt.X(
            "x:Q",
            title=f"{unit} of work",
            axis=alt.Axis(grid=False, tickCount=10),
            scale=alt.Scale(nice=False, zero=True),
        )
        unscaled = alt.Scale(domain=[0, 1], range=[0, 1])

        def draw(values: Sequence[Mapping[str, Any]], name: str, color: str) -> Chart:
            base = alt.Chart(self._values(values), width=_WIDE, height=height * len(names))
            return base.mark_rect(color=color).encode(
                x=x,
                x2="x2:Q",
                y=y,
                y2="y2:Q",
                opacity=alt.Opacity(f"{name}:Q", scale=unscaled, legend=None),
            )

        texts = (
            alt.Chart(self._values(labels))
            .mark_text(align="right", dx=-8, color=INK)
            .encode(text="name:N", x=alt.value(0), y=y)
        )
        layers = [draw(rows, "level", ACCENT), texts]
        if broken := [row for row in rows if row["failed"]]:
            layers.insert(1, draw(broken, "failed", FAIL))
        return self._draw(alt.layer(*layers), "load of the endpoints over time")

    def draw_intervals(
        self,
        rows: Sequence[tuple[str, float, float | None, float | None]],
        label: str,
        domain: tuple[float, float] | None = None,
    ) -> Markup:
        """Draw values with their intervals: name, value, low and high.

        Args:
            rows: The values.
            label: What they are.
            domain: Ends of the scale; by default 1, and 0 or the lowest value.
        """
        alt = self._alt
        values: list[dict[str, Any]] = [
            {
                "n": n,
                "label": _short_label(name),
                "value": value,
                "low": value if low is None else low,
                "high": value if high is None else high,
                "text": f"{value:.3g}" if domain else f"{value:.3f}",
            }
            for n, (name, value, low, high) in enumerate(rows)
        ]
        least = min(0.0, *(row["low"] for row in values))
        base = alt.Chart(self._values(values), width=360, height=26 * len(values))
        y = alt.Y("n:O", axis=None)
        scale = alt.Scale(domain=list(domain or (least, 1)), nice=domain is not None, zero=False)
        x = alt.X("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5))
        lines = base.mark_rule(color=ACCENT, strokeWidth=2).encode(
            y=y, x=alt.X("low:Q", title=None, scale=scale), x2="high:Q"
        )
        dots = base.mark_circle(color=ACCENT, size=70, opacity=1).encode(y=y, x=x)
        names = base.mark_text(align="right", dx=-8, color=INK)
        numbers = base.mark_text(align="left", dx=8, color=MUTED)
        return self._draw(
            lines
            + dots
            + names.encode(y=y, text="label:N", x=alt.value(0))
            + numbers.encode(y=y, text="text:N", x=alt.value(360)),
            label,
        )

    def draw_matrix(
        self, labels: Sequence[str], counts: Sequence[Sequence[int]], label: str
    ) -> Markup:
        """Draw a confusion matrix: a row per true value, a column per answer."""
        alt, size = self._alt, 46 if len(labels) <= 8 else 30  # noqa: PLR2004 - room for numbers
        values = [
            {"y": y, "x": x, "count": f"{count:,}", "share": count / (sum(row) or 1)}
            for y, row in enumerate(counts)
            for x, count in enumerate(row)
        ]
        side = size * len(labels)
        base = alt.Chart(self._values(values), width=side, height=side).encode(
            x=alt.X("x:O", axis=None), y=alt.Y("y:O", axis=None)
        )
        names = [{"n": n, "label": _short_label(name)} for n, name in enumerate(labels)]
        of = alt.Chart(self._values(names))
        scale = alt.Scale(domain=[0, 1], range=[0.04, 0.75])
        cells = base.mark_rect(color=ACCENT).encode(
            opacity=alt.Opacity("share:Q", scale=scale, legend=None)
        )
        left = of.mark_text(align="right", dx=-8, color=INK).encode(
            y=alt.Y("n:O", axis=None), x=alt.value(0), text="label:N"
        )
        top = of.mark_text(align="left", angle=315, dx=4, dy=-6, color=INK).encode(
            x=alt.X("n:O", axis=None), y=alt.value(0), text="label:N"
        )
        numbers = base.mark_text(color=INK).encode(text="count:N")
        return self._draw(cells + numbers + left + top, label)


def _short_label(text: str) -> str:
    line = " ".join(text.split()) or "(blank)"
    return shorten(line if len(line) <= _LABEL else f"{line[: _LABEL - 1]}…")
