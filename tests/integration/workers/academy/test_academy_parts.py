"""Parts of the Academy backend, without a separate process."""

from __future__ import annotations

import sys
import time
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from academy.exchange import UserExchangeClient
from academy.exchange.mailbox_status import MailboxStatus
from academy.manager import Manager
from pydantic import SecretStr

from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    MissingExtraError,
    WorkerLostError,
)
from fanfold.backends.workers.academy.backend import AcademyBackend, AgentManager
from fanfold.backends.workers.academy.exchange import ExchangeSettings, open_exchange
from fanfold.backends.workers.executor import SingleProcessExecutor
from fanfold.backends.workers.registry import make_backends
from fanfold.backends.workers.testing import make_task
from fanfold.configs.backend import BackendConfig, ExchangeConfig
from fanfold.graphs.worker import work_shard

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Unclosed (connection|client session):ResourceWarning"),
]


def threads() -> Executor:
    return ThreadPoolExecutor(4)


def place(at: ExchangeSettings, make: Any = threads) -> AcademyBackend:
    return AcademyBackend(AgentManager(at, work_shard, 1, make), "agent", 60.0)


async def test_a_deaf_coordinator_connects_anew() -> None:
    """Academy's listener may die unheard; agents live on, and nobody hears them."""
    backend = place(ExchangeSettings(silence_s=0.6))
    await backend.start()
    try:
        hand = backend._agent
        assert hand is not None
        client = hand.manager.exchange_client
        assert isinstance(client, UserExchangeClient)
        await client._stop_listener_task()
        with pytest.raises(WorkerLostError, match="answers no longer arrive"):
            await backend.submit(make_task("s", [{}]).to_json())
        assert backend.capacity() == 0
        await backend.rebuild()
        assert backend._agent is not None
        assert backend._agent.manager is not hand.manager
        summary = await backend.submit(make_task("s", [{}]).to_json())
        assert summary["tally"] == {"done": 1, "failed": 0}
    finally:
        await backend.close(1.0)


async def test_a_stop_reaches_agents_that_share_no_folder() -> None:
    backend = place(ExchangeSettings())
    await backend.start()
    try:
        await backend.stop()
        summary = await backend.submit(
            make_task("s", [{"seconds": 0.1}] * 100, streams=1).to_json()
        )
        assert summary["stopped"] == "the coordinator stopped the run"
    finally:
        await backend.close(1.0)


async def test_an_order_that_the_exchange_does_not_carry() -> None:
    backend = place(ExchangeSettings())
    await backend.start()
    try:
        noise = "".join(chr(0x4E00 + hash((n, "x")) % 20000) for n in range(300_000))
        with pytest.raises(ConfigurationError, match="carries 500,000; set shard"):
            await backend.submit(make_task("s", [{"text": noise}]).to_json())
    finally:
        await backend.close(1.0)


async def test_the_runs_own_exchange_answers_nobody_else() -> None:
    async with open_exchange(ExchangeSettings()) as factory, aiohttp.ClientSession() as session:
        where = factory._info.url  # type: ignore[attr-defined]
        assert where.startswith("http://127.0.0.1:")
        for headers in ({}, {"Authorization": "Bearer guess"}):
            async with session.get(f"{where}/discover", headers=headers) as response:
                assert response.status == 401
        async with await Manager.from_exchange_factory(factory) as manager:
            assert manager.user_id is not None


async def test_the_environment_is_not_the_own_exchanges_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of .netrc replaced the token, and a proxy was sent it."""
    (tmp_path / "netrc").write_text("default login other password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with (
        open_exchange(ExchangeSettings()) as factory,
        await Manager.from_exchange_factory(factory) as manager,
        await manager.exchange_factory.create_user_client() as other,  # as a worker has it
    ):
        assert await other.status(manager.user_id) is MailboxStatus.ACTIVE


@pytest.mark.parametrize("kind", ["redis", "http"])
async def test_an_exchange_that_is_not_there(kind: Any) -> None:
    url = "http://127.0.0.1:9" if kind == "http" else None
    backend = place(
        ExchangeSettings(
            ExchangeConfig(kind=kind, port=9, password=SecretStr("top-secret"), url=url)
        )
    )
    with pytest.raises(
        BackendError, match=r"exchange at .*127\.0\.0\.1:9 does not answer"
    ) as caught:
        await backend.start()
    assert (
        "top-secret"
        not in f"{caught.value!r} {caught.value.__cause__!r} {backend._manager.settings!r}"
    )
    await backend.close()


async def test_an_agent_that_cannot_start() -> None:
    def not_importable(order: dict[str, Any]) -> dict[str, Any]:
        return order

    backend = AcademyBackend(
        AgentManager(ExchangeSettings(), not_importable, 1, None), "agent", 60.0
    )
    try:
        with pytest.raises(ConfigurationError, match=r"not_importable.*where agents run"):
            await backend.start()
    finally:
        await backend.close(1.0)


def configured(**settings: Any) -> BackendConfig:
    return BackendConfig.model_validate({"kind": "academy"} | settings)


def test_settings_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    local = configured(exchange={"kind": "local"}, executor=f"{__name__}:threads")
    with pytest.raises(ConfigurationError, match="keeps all agents in this process"):
        make_backends(local, work_shard)
    with pytest.raises(ConfigurationError, match="nowhere:x cannot be imported"):
        make_backends(configured(executor="nowhere:x"), work_shard)
    monkeypatch.setitem(sys.modules, "academy", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fanfold\[academy\]'"):
        make_backends(configured(), work_shard)


async def test_settings_that_fail_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="UUID of a Globus project"):
        await place(ExchangeSettings(ExchangeConfig(kind="globus"))).start()
    with pytest.raises(ConfigurationError, match=r"exchange\.host: 192\.0\.2\.1"):
        await place(ExchangeSettings(ExchangeConfig(host="192.0.2.1"))).start()
    backend = place(ExchangeSettings(), make=list)
    with pytest.raises(ConfigurationError, match="made list, not a concurrent"):
        await backend.start()
    await backend.close()


def test_a_process_of_its_own(tmp_path: Path) -> None:
    assert SingleProcessExecutor().submit((tmp_path / "here").touch).result(20) is None
    assert (tmp_path / "here").exists()
    failing = SingleProcessExecutor()
    with pytest.raises(BrokenExecutor, match="FileNotFoundError"):
        failing.submit((tmp_path / "no" / "where").touch).result(20)
    with pytest.raises(RuntimeError, match="accepts one call"):
        failing.submit(print)
    sleeping = SingleProcessExecutor()
    future = sleeping.submit(time.sleep, 60)
    sleeping.shutdown()
    with pytest.raises(BrokenExecutor, match="exit code -9"):
        future.result(20)
