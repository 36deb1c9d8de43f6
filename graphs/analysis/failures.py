"""Error classes of a run, each with a remedy and an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...backends.core.errors import ConfigurationError
from ...backends.core.remedies import find_remedy
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder
from ...configs.raw_settings import read_settings
from ..run.result_rows import PromptRenderer, read_prompts


@dataclass(frozen=True, slots=True)
class FailureClasses:
    """The error classes of a run.

    Attributes:
        rows: One per class, the most frequent first.
        notice: Why no requests are shown, or None.
    """

    rows: list[dict[str, Any]]
    notice: str | None = None


def describe_failures(folder: RunFolder, journal: Journal, store: ItemStore) -> FailureClasses:
    """Describe the error classes of a run.

    Raises:
        JournalError: The journal or the item store is damaged.
    """
    notice, prompts = None, None
    try:
        prompts = read_prompts(read_settings(folder.settings).data, str(folder.settings))
    except ConfigurationError as error:  # e.g. a variable in the prompt that is not set here
        notice = f"{error.message}; rows of the input are shown instead of requests"
    rows = [
        _describe_class(name, count, journal, store, prompts)
        for name, count in journal.count_failures().items()
    ]
    return FailureClasses(rows, notice)


def _describe_class(
    name: str, count: int, journal: Journal, store: ItemStore, prompts: PromptRenderer | None
) -> dict[str, Any]:
    """Return an error class as data, with its first item in input order as the example."""
    index = next(journal.find_failed(name))
    record = journal.read_record(index)
    (item,) = store.read(index, index + 1)
    remedy = find_remedy(name)
    messages = prompts.render(record, item.row) if prompts and record.get("requests") else None
    return {
        "class": name,
        "count": count,
        "remedy": remedy.text,
        "retry": remedy.is_retry,
        "example": {
            "id": record.get("id"),
            "error": record.get("error"),
            "endpoint": record.get("endpoint"),
            "requests": record.get("requests"),
            "repairs": record.get("repairs"),
            "messages": messages,
            "row": item.row if messages is None else None,
            "response": record.get("raw"),
            "response_bytes": record.get("raw_bytes"),
        },
    }
