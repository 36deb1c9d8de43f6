"""Token counts of a stage: the same in all sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.discovery.connect import ReadyEndpoints
from fanfold.graphs.run.stage_tokens import StageTokens


async def open_openai() -> ReadyEndpoints:
    """Return a model without a server that counts, whose counts are estimates."""
    return ReadyEndpoints((), "some-model", simulated=False)


async def no_endpoints() -> ReadyEndpoints:
    raise AssertionError("the endpoints are not needed")


async def test_counts_are_kept_for_later_sessions(tmp_path: Path) -> None:
    (tmp_path / "token_counts.jsonl").write_bytes(b'["0123456789abcdef",7]\n')
    first = StageTokens(tmp_path, open_openai)
    assert [await first.count(text) for text in ("a", "b")] == [None, None]
    await first.aclose()
    lines = (tmp_path / "token_counts.jsonl").read_bytes().splitlines()
    assert len(lines) == 2  # that of another text is gone


async def test_a_later_session_asks_no_endpoint_for_what_is_known(tmp_path: Path) -> None:
    first = StageTokens(tmp_path, open_openai)
    await first.count("a")
    await first.aclose()
    file = tmp_path / "token_counts.jsonl"
    known = file.read_bytes()
    file.write_bytes(known.replace(b"null", b"12") + known[:9])  # a kill has cut the second line
    second = StageTokens(tmp_path, no_endpoints)
    assert await second.count("a") == 12
    with pytest.raises(AssertionError):
        await second.count("b")
    await second.aclose()
    third = StageTokens(tmp_path, open_openai)
    assert [await third.count(text) for text in ("a", "b")] == [12, None]
    await third.aclose()
    assert file.read_bytes().count(b"\n") == 2
