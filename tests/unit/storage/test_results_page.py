"""docs/results.md lists what the results contain and every error class."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq

from fanfold.backends.core.errors import FanfoldError
from fanfold.backends.fleet.endpoint import BreakerState
from fanfold.backends.storage.endpoints_table import append_endpoints
from fanfold.backends.storage.results import RESULT_COLUMNS
from fanfold.backends.storage.results_schema import OPTIONAL_COLUMNS, UNFIT_COLUMN
from fanfold.backends.storage.timeline import SCHEMA
from fanfold.configs.aggregators import AGGREGATOR_CONFIGS

PAGE = Path(str(files("fanfold")), "docs", "results.md").read_text()
ERROR = re.compile(r"`(\w+Error)`")


def first_cells(section: str) -> list[str]:
    """Return the names in the first column of a section's tables."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall("`([^`]+)`", cell)]


def subclasses(base: type[FanfoldError]) -> Iterator[type[FanfoldError]]:
    """Yield a class and those derived from it in the product, whatever is imported."""
    yield base
    for derived in base.__subclasses__():
        if derived.__module__.startswith("fanfold.") and ".tests." not in derived.__module__:
            yield from subclasses(derived)


def test_every_column_of_results_and_failures_is_listed() -> None:
    columns = [*RESULT_COLUMNS, UNFIT_COLUMN, *OPTIONAL_COLUMNS]
    assert first_cells("Columns of the results")[: len(columns)] == columns


def test_every_column_and_state_of_the_endpoints_is_listed(tmp_path: Path) -> None:
    append_endpoints(path := tmp_path / "endpoints.parquet", [], 1)
    columns = pq.read_schema(path).names
    listed = first_cells("endpoints.parquet")
    assert listed[: len(columns) + 1] == [*columns, "state"]
    assert {state.value for state in BreakerState} <= set(listed)


def test_every_column_of_the_timeline_is_listed() -> None:
    assert set(SCHEMA.names) <= set(first_cells("timeline.arrow"))


def test_every_aggregator_is_listed() -> None:
    assert AGGREGATOR_CONFIGS.keys() <= set(first_cells("aggregate.json"))


def test_every_error_class_is_listed_and_no_other() -> None:
    found = {error.__name__ for error in subclasses(FanfoldError)}
    names = {name for name in found if not name.startswith("_")}  # private ones never leave fanfold
    listed = set(ERROR.findall(PAGE))
    assert names <= listed
    internal = {"ApiError"}  # known only once their modules are imported
    assert {name for name in listed if not hasattr(builtins, name)} <= names | internal
