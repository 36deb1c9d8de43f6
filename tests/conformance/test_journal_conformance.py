from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from fanfold.backends.storage.journal import Journal
from fanfold.tests.conformance import journal_checks
from fanfold.tests.conformance.journal_checks import CHECKS, Check, Subject


def opener(folder: Path) -> Callable[[int], AbstractAsyncContextManager[Journal]]:
    @asynccontextmanager
    async def opened(items: int) -> AsyncIterator[Journal]:
        ledger = Journal(folder, "run", items)
        ledger.start_session("test", 0.001)
        try:
            yield ledger
        finally:
            await ledger.aclose()

    return opened


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_journal_is_a_ledger(check: Check, tmp_path: Path) -> None:
    def tear() -> None:
        file = max(tmp_path.glob("*.jsonl"))
        file.write_bytes(file.read_bytes()[:-100])

    await check(Subject(opener(tmp_path), tear))


class Forgetful(Journal):
    """Loses the last record."""

    async def aclose(self) -> None:
        await super().aclose()
        if paths := sorted(self._folder.glob("*.jsonl")):
            lines = paths[-1].read_bytes().splitlines(keepends=True)
            paths[-1].write_bytes(b"".join(lines[:-1]))


async def test_the_checks_can_fail(tmp_path: Path) -> None:
    @asynccontextmanager
    async def opened(items: int) -> AsyncIterator[Journal]:
        ledger = Forgetful(tmp_path, "run", items)
        ledger.start_session("test", 0.001)
        yield ledger
        await ledger.aclose()

    with pytest.raises(AssertionError, match="records"):
        await journal_checks.keeps_over_lives(Subject(opened))
