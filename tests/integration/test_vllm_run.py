"""A run against real vLLM servers, named by ``FANFOLD_TEST_VLLM_URL`` (separated by commas).

Any model will do: the schema constrains the answers, and a prompt that no context holds must fail
its own item only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
import pytest

from fanfold import build_graph

URLS: Final = [url for url in os.environ.get("FANFOLD_TEST_VLLM_URL", "").split(",") if url]
LONG: Final = "molecule " * 400_000
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "score"],
    "properties": {
        "kind": {"type": "string", "enum": ["a", "b", "c"]},
        "score": {"type": "string", "enum": ["low", "high"]},
    },
}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not URLS, reason="FANFOLD_TEST_VLLM_URL is not set"),
]


async def test_more_items_than_the_servers_take_at_once_and_two_that_are_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "task": {"prompt": "Judge {x}.", "schema": SCHEMA},
        "model": {"max_tokens": 512, "temperature": 1.0, "price": {"prompt": 1, "completion": 2}},
        "endpoints": {"urls": URLS},
        "limits": {"streams": 512},
        "budget": {"usd": 10},
        "reduce": [{"op": "histogram", "field": "kind"}],
    }
    items = [{"id": f"i{n}", "x": LONG if n in {70, 140} else f"thing {n}"} for n in range(200)]
    end = await build_graph(config).ainvoke({"items": items})
    assert end["results"]["simulated"] is False
    rows = {row["id"]: row for row in pq.read_table(end["results"]["table"]).to_pylist()}
    failed = {i: row["error_class"] for i, row in rows.items() if row["status"] == "failed"}
    assert failed == dict.fromkeys(["i70", "i140"], "PromptTooLongError")
    assert len(rows) == len(items)
    done = [row for i, row in rows.items() if i not in failed]
    assert all(row["output"]["kind"] in {"a", "b", "c"} for row in done)
    assert all(row["prompt_tokens"] > 0 and row["completion_tokens"] > 0 for row in done)
    assert end["progress"]["usd"] > 0
