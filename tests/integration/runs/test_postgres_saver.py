"""Checkpoints in PostgreSQL, against a real server if one answers."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Iterator

import psycopg
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.tests.integration.runs.conftest import LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

URL = os.environ.get("FANFOLD_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the URL of a schema of its own, which is dropped at the end."""
    try:
        connection = psycopg.connect(URL, connect_timeout=3, autocommit=True)
    except psycopg.OperationalError as error:
        reason = str(error).splitlines()[0]
        pytest.skip(f"no PostgreSQL answers (set FANFOLD_TEST_POSTGRES_URL): {reason}")
    name = f"fanfold_{secrets.token_hex(4)}"
    with connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
        yield f"{URL}{'&' if '?' in URL else '?'}options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


def checkpoints(url: str, run: str) -> int:
    with psycopg.connect(url) as connection:
        query = "SELECT count(*) FROM checkpoints WHERE thread_id = %s"
        row = connection.execute(query, [run]).fetchone()
        return row[0] if row else 0


async def test_run_drain_and_resume(lab_of: LabMaker, server: str) -> None:
    async with lab_of(items=120) as lab:
        lab.config["shard"] = {"items": 10}
        aggregate = await lab.undisturbed()
        life = asyncio.create_task(lab.live(await lab.begin(), checkpointer=server))
        await lab.until(lambda: lab.journal_lines() >= 40)
        os.kill(os.getpid(), signal.SIGTERM)
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert result.exit_code == 5
        lab.life_ended()
        before = await asyncio.to_thread(checkpoints, server, result.run_id)
        assert before > 0
        result = await lab.live(checkpointer=server)
        assert result.exit_code == 0
        assert await asyncio.to_thread(checkpoints, server, result.run_id) > before
        assert not (lab.out / "checkpoints.sqlite").exists()
        lab.assert_whole(aggregate, again=0)


async def test_killed_and_resumed_without_it(lab_of: LabMaker, server: str) -> None:
    async with lab_of(items=120) as lab:
        aggregate = await lab.undisturbed()
        await lab.begin()
        await lab.killed_at(40, "resume", str(lab.out), "--quiet", "--checkpointer", server)
        assert (await lab.live()).exit_code == 0
        lab.assert_whole(aggregate, again=16)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:hush@127.0.0.1:1/db", "cannot be reached: .*refused"),
        ("postgresql://me:hush@127.0.0.1:one/db", "cannot be reached|unknown part"),
        ("mysql://me:hush@127.0.0.1/db", "expected postgresql://"),
    ],
)
async def test_what_cannot_be_used_is_refused_before_anything(
    lab_of: LabMaker, url: str, words: str
) -> None:
    async with lab_of(items=5) as lab:
        folder = await lab.begin()
        with pytest.raises(ConfigurationError, match=words) as caught:
            await lab.live(folder, checkpointer=url)
        assert "hush" not in caught.value.message
        arguments = ("resume", str(lab.out), "--quiet", "--checkpointer", url)
        if "mysql" in url:
            async with lab.process(*arguments) as process:
                assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 2
        assert lab.journal_lines() == 0
