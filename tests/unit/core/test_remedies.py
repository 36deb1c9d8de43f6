"""The remedies of error classes are those of the documentation."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from fanfold.backends.core import errors
from fanfold.backends.core.remedies import find_remedy

ROOT = Path(str(files("fanfold")))


def documented() -> dict[str, str]:
    """Return the remedy of each class in the table *Errors of an item*."""
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.partition("\n## Errors of an item\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section, re.MULTILINE)
    return {name: remedy.replace("`", "") for name, remedy in rows}


def test_every_documented_class_has_its_remedy() -> None:
    rows = documented()
    assert len(rows) > 10
    for name, remedy in rows.items():
        assert issubclass(getattr(errors, name), errors.FanfoldError)
        assert find_remedy(name).text == remedy, name


def test_any_other_class_comes_from_the_users_graph() -> None:
    assert find_remedy("ValueError").text == "correct task.graph"
    assert find_remedy("ValueError").is_retry


def test_a_remedy_by_a_setting_of_the_task_is_no_retry() -> None:
    assert not find_remedy("TruncatedAnswerError").is_retry
    assert find_remedy("EndpointLostError").is_retry
