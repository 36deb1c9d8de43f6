"""The Parsl configuration of a backend, and when it can no longer be used; nothing starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError, MissingExtraError
from fanfold.backends.workers import parsl
from fanfold.backends.workers.parsl import JobNodes, ParslBackend, htex_job, htex_local

MODULE = """
from parsl.config import Config
from parsl.executors.threads import ThreadPoolExecutor
config = Config(executors=[ThreadPoolExecutor()], usage_tracking=0)
def make(): return Config(executors=[ThreadPoolExecutor(label="made")], usage_tracking=0)
wrong = 5
def no_config(): return 5
"""


def work(order: dict[str, Any]) -> dict[str, Any]:
    return order


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_parsl_site.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_parsl_site"


@pytest.mark.parametrize("name", ["config", "make"])
def test_a_users_config_is_new_each_time(module: str, name: str) -> None:
    backend = ParslBackend(f"{module}:{name}", work, 2)
    one, two = (backend._load_user_config(module, name) for _ in range(2))
    assert type(one).__name__ == type(two).__name__ == "Config"
    assert one is not two
    assert one.executors[0] is not two.executors[0]


@pytest.mark.parametrize("name", ["missing", "no_config"])
async def test_what_is_no_config(module: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{module}:{name}"):
        await ParslBackend(f"{module}:{name}", work, 2).start()


async def test_what_cannot_be_imported() -> None:
    with pytest.raises(ConfigurationError, match="no module nowhere_at_all"):
        await ParslBackend("nowhere_at_all:config", work, 2).start()


async def test_nothing_is_loaded() -> None:
    with pytest.raises(ConfigurationError, match=r"call parsl\.load"):
        await ParslBackend("loaded", work, 2).start()


def test_parsl_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsl, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"fanfold\[parsl\]"):
        ParslBackend("htex_local", work, 2)


def test_the_built_in_config_is_local_and_silent(tmp_path: Path) -> None:
    config = htex_local(3, tmp_path)
    (executor,) = config.executors
    assert (executor.address, executor.loopback_address) == ("127.0.0.1", "127.0.0.1")
    assert executor.max_workers_per_node == 3
    assert (config.retries, config.strategy, config.usage_tracking) == (0, "none", 0)
    assert config.initialize_logging is False
    assert (config.run_dir, executor.worker_logdir_root) == (str(tmp_path), str(tmp_path))


def test_the_config_inside_a_job_is_encrypted_and_takes_the_nodes_python(tmp_path: Path) -> None:
    nodes = JobNodes(("mpiexec", "-n", "3"), ("/copy/bin/python", "-P"), "localhost", tmp_path)
    config = htex_job(nodes, tmp_path)
    (executor,) = config.executors
    assert (executor.address, executor.encrypted) == ("127.0.0.1", True)
    assert executor.max_workers_per_node == 1
    assert executor.launch_cmd.startswith("/copy/bin/python -P -m parsl.executors")
    assert executor.provider.launcher("x", 1, 1) == "mpiexec -n 3 x"
    assert (config.retries, config.strategy, config.run_dir) == (0, "none", str(tmp_path))
    with pytest.raises(ConfigurationError, match="has no address"):
        htex_job(replace(nodes, host="no-such-host.invalid"), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "ended", "capacity"),
    [("none", [True, True], 0), ("none", [True, False], 2), ("simple", [True], 2), ("none", [], 2)],
)
def test_blocks_that_have_ended(strategy: str, ended: list[bool], capacity: int) -> None:
    backend = ParslBackend("htex_local", work, 2)
    blocks = {str(n): SimpleNamespace(terminal=end) for n, end in enumerate(ended)}
    kernel = SimpleNamespace(
        cleanup_called=False,
        config=SimpleNamespace(strategy=strategy),
        executors={"a": SimpleNamespace(status_facade=blocks)},
    )
    backend._executor = SimpleNamespace(_dfk=kernel)  # type: ignore[assignment]
    assert backend.capacity() == capacity
    kernel.cleanup_called = True
    assert backend.capacity() == 0
