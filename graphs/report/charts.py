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
        spec = chart.to_dict() | {"config": config}
        return clean_svg(self._convert(spec), label)

    def _values(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return self._alt.Data(values=list(rows))

    def draw_counts(self, counts: Sequence[tuple[str, int]], label: str) -> Markup:
        """Draw one bar per value, in the order given, with its count and share."""
        alt, total = self._alt, sum(count for _, count in counts) or 1
        rows = [
            {
                "n": n,
                "label": _short_label(name),
                "count": count,
                "text": f"{count:,}  ({count / total:.1%})",
            }
            for n, (name, count) in enumerate(counts)
        ]
        # Labels are marks, not labels of the axis: two long values may look the same.
        widest = 1.35 * max(count for _, count in counts) or 1
        base = alt.Chart(self._values(rows), width=300, height=24 * len(rows)).encode(
            y=alt.Y("n:O", axis=None),
            x=alt.X("count:Q", axis=None, scale=alt.Scale(domain=[0, widest])),
        )
        names = base.mark_text(align="right", dx=-8, color=INK).encode(
            text="label:N", x=alt.value(0)
        )
        bars = base.mark_bar(height=14, cornerRadiusEnd=2, color=ACCENT)
        texts = base.mark_text(align="left", dx=5, color=MUTED).encode(text="text:N")
        return self._draw(names + bars + texts, label)

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


def _short_label(text: str) -> str:
    line = " ".join(text.split()) or "(blank)"
    return shorten(line if len(line) <= _LABEL else f"{line[: _LABEL - 1]}…")
