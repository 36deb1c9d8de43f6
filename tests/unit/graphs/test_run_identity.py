from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.secrets import MASKED, mask_arguments
from fanfold.configs.loader import load_config
from fanfold.graphs.run.fingerprint import compute_fingerprint, diff_settings
from fanfold.graphs.run.shard_plan import choose_shard_items, choose_window

BASE = load_config("data_annotation")


def changed(*overrides: str) -> dict[str, Any]:
    return load_config("data_annotation", overrides).plain


@pytest.mark.parametrize(
    "override",
    [
        "task.prompt=x",
        "task.repairs=0",
        "model.seed=2",
        "model.name=b",
        "input.id=null",
        "input.limit=3",
    ],
)
def test_what_makes_another_run(override: str) -> None:
    (line,) = diff_settings(BASE.plain, changed(override), "a")
    assert line.startswith(override.partition("=")[0])
    assert "→" in line


@pytest.mark.parametrize(
    "override",
    ["limits.streams=1", "endpoints.simulated.nodes=1", "reduce=[]", "name=x", "model.name=a"],
)
def test_what_does_not(override: str) -> None:
    assert diff_settings(BASE.plain, changed(override), "a") == []


def test_the_fingerprint_is_of_what_is_asked() -> None:
    other = load_config("data_annotation", ["limits.streams=1"]).config
    assert compute_fingerprint(BASE.config, "a", True) == compute_fingerprint(other, "a", True)
    assert compute_fingerprint(BASE.config, "a", True) != compute_fingerprint(
        BASE.config, "a", False
    )
    assert compute_fingerprint(BASE.config, "a", True) != compute_fingerprint(
        BASE.config, "b", True
    )


def test_secrets_in_the_command_line() -> None:
    given = [
        "run",
        "c.yaml",
        "--set",
        "endpoints.api_key=s3cr3t",
        "--endpoints",
        "http://u:s3cr3t@h:1/v1?token=s3cr3t",
        "--checkpointer=postgresql://u:s3cr3t@h/db",
        "--set",
        "limits.streams=3",
    ]
    kept = list(mask_arguments(given))
    assert "s3cr3t" not in " ".join(kept)
    assert kept[:4] == ["run", "c.yaml", "--set", f"endpoints.api_key={MASKED}"]
    assert kept[5:] == [
        f"http://u:{MASKED}@h:1/v1?token={MASKED}",
        f"--checkpointer=postgresql://u:{MASKED}@h/db",
        "--set",
        "limits.streams=3",
    ]


@pytest.mark.parametrize("total", [1, 200, 5_000, 1_000_000])
def test_shards(total: int) -> None:
    assert 256 <= choose_shard_items(BASE.config, total) <= 4096
    one = load_config("data_annotation", ["shard.items=1"]).config
    assert choose_shard_items(one, total) == 1
    assert choose_window(one, 1) >= one.limits.streams
