"""Results of shards that would be too large."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import BackendError
from fanfold.backends.core.messages import ShardResult
from fanfold.backends.core.values import json_size
from fanfold.backends.storage.worker_journal import ResultJournal
from fanfold.graphs.worker import _fit_message

from .coordinator_lab import Lab, record, summary, until

CARRY = 20_000
ANSWERS = st.lists(
    st.tuples(st.sampled_from('x\N{CYRILLIC SMALL LETTER YA}"'), st.integers(0, 3 * CARRY)),
    max_size=12,
)


@given(ANSWERS, st.integers(0, 3 * CARRY))
def test_every_result_fits(answers: list[tuple[str, int]], part: int) -> None:
    """The first records are kept, and what is left out is counted."""
    journal = ResultJournal(CARRY, streams=len(answers) or 1)
    for index, (letter, size) in enumerate(answers):
        journal.put(record(index) | {"output": letter * size})
    records = journal.records_to_send
    tally = {s: sum(r["status"] == s for r in records) for s in ("done", "failed")}
    full = ShardResult(
        "0-12", 0, "0", "host:1", tally, parts={"p": "x" * part}, records=list(records)
    )
    result = _fit_message(full, CARRY)
    kept = result.records or []
    assert json_size(result.to_json()) <= 2 * CARRY
    assert kept == records[: len(kept)]
    assert len(kept) >= min(1, len(records))
    assert result.dropped == len(records) - len(kept)
    assert sum((result.tally or {}).values()) == len(kept)
    assert (result.parts is None) or not result.dropped
    if json_size(full.to_json()) <= CARRY:
        assert result == full


def test_a_result_without_records_keeps_its_tally() -> None:
    """They are in the shared folder, however large the aggregate is."""
    full = ShardResult("0-9", 0, "0", "host:1", {"done": 9, "failed": 0}, parts={"p": "x" * CARRY})
    result = _fit_message(full, CARRY)
    assert (result.parts, result.tally, result.dropped) == (None, full.tally, 0)


async def test_items_that_were_dropped_are_sent_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With half as many requests in flight."""
    lab = Lab(tmp_path, shared=False, streams=16)
    async with lab.opened():
        answers = lab.answers(0, 3)
        first = asyncio.ensure_future(anext(answers))
        await until(lambda: lab.site.orders)
        with caplog.at_level(logging.WARNING):
            lab.site.answers[0].set_result(summary("0-3", range(1), records=[record(0)], dropped=2))
            assert (await first) is not None
        second = asyncio.ensure_future(anext(answers))
        await until(lambda: len(lab.site.orders) == 2)
        assert [item[0] for item in lab.site.orders[1]["items"]] == [1, 2]
        assert [order["streams"] for order in lab.site.orders] == [16, 8]
        lab.site.answers[1].set_result(summary("0-3", range(1, 3), records=[record(1), record(2)]))
        await second
        await answers.aclose()
    assert "the answers of 2 items of shard 0-3 did not fit" in caplog.text
    assert lab.progress.done == 3


@pytest.mark.parametrize("dropped", [-1, 2**63, "2", True, None])
def test_a_count_of_dropped_items_is_checked(dropped: Any) -> None:
    with pytest.raises(BackendError, match="dropped"):
        ShardResult.from_json(summary("0-3", range(1)) | {"dropped": dropped})
