"""The page of a report: template, style sheet, script, and the data they show."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...backends.core.messages import own_version
from ...backends.core.terminal import escape_controls
from ...backends.storage.run_folder import RunFolder, open_folder, write_bytes
from . import words
from .data import ReportData, read_report
from .flags import FLAGS
from .texts import NONE, has_long_word

_FOLDER: Final = "templates"


def write_report(path: Path, target: Path | None = None) -> Path:
    """Write the report of a run; return the file.

    Args:
        path: The run folder.
        target: The file; None is ``report.html`` in the run folder.

    Raises:
        ConfigurationError: The folder is no run folder.
        JournalError: A file of the run is damaged, or the report cannot be written.
    """
    folder: RunFolder = open_folder(path)
    target = folder.report if target is None else target
    write_bytes(target, render_page(read_report(folder)))
    return target


def render_page(data: ReportData) -> bytes:
    """Return the page of a report."""
    script = _read_file("table.js")
    return render_template(
        "report.html.j2",
        data,
        sections=words.list_sections(data),
        script=Markup(script),
        script_hash=_hash(script),
        meta=_to_script_json(_make_meta(data)),
        table=_to_base64(data.rows.table),
        blocks=[_to_base64(block) for block in data.rows.blocks],
    )


def render_template(name: str, data: object, **more: Any) -> bytes:
    """Return a page.

    Args:
        name: Its template.
        data: What it says.
        **more: Further values for the template.
    """
    style = _read_file("style.css")
    environment = Environment(
        loader=PackageLoader(__package__, _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_show,
    )
    environment.tests["long_word"] = has_long_word
    environment.filters["number"] = lambda value: NONE if value is None else f"{value:,}"
    text = environment.get_template(name).render(
        data=data,
        words=words,
        style=Markup(style),
        style_hash=_hash(style),
        version=own_version(),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        **more,
    )
    return text.encode(errors="replace")


def _read_file(name: str) -> str:
    return (files(__package__) / _FOLDER / name).read_text("utf-8")


def _show(value: Any) -> Any:
    """Spell out control characters of texts; the parts of the page itself have none."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return escape_controls(value)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _to_base64(content: bytes) -> Markup:
    return Markup(base64.b64encode(content).decode())


def _to_script_json(content: Mapping[str, Any]) -> Markup:
    """Return JSON that cannot end the element which contains it."""
    text = orjson.dumps(content).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _make_meta(data: ReportData) -> dict[str, Any]:
    return {"constants": data.constants, "flags": dict(FLAGS)}
