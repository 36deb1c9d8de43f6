"""Runs over a folder of hosts, which join during the wait and later join and leave."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from fanfold.backends.core.errors import RunStoppedError
from fanfold.tests.integration.runs.conftest import STREAMS, Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration


def in_folder(lab: Lab, **settings: Any) -> Any:
    folder = lab.home / "servers"
    folder.mkdir()
    lab.config["endpoints"] = {"file": str(folder), "refresh_s": 0.02} | settings
    return folder


async def test_hosts_join_and_leave_a_run(lab_of: LabMaker) -> None:
    async with lab_of(items=400) as lab:
        aggregate = await lab.undisturbed()
        first, second = lab.fleet.urls
        folder = in_folder(lab)
        (folder / "node1").write_text(f"{first}\n")
        life = asyncio.create_task(lab.live(await lab.begin()))
        await lab.until(lambda: lab.journal_lines() >= 20)
        (folder / "node2").write_text(f"{second}\n")
        await lab.until(lambda: asked(lab)[1] > 5)
        (folder / "node1").unlink()
        before = await left_alone(lab, 0, 1)
        assert not life.done()
        result = await asyncio.wait_for(life, DEADLINE_S)
        assert (result.exit_code, asked(lab)[0]) == (0, before)
        lab.assert_whole(aggregate, again=0)


def asked(lab: Lab) -> list[int]:
    return [node["requests"] for node in lab.fleet.stats()["nodes"]]


async def left_alone(lab: Lab, node: int, other: int) -> int:
    """Wait until the one node gets no request while the other gets many; return its requests."""
    while True:
        before = asked(lab)
        await lab.until(partial(lambda least: asked(lab)[other] >= least, before[other] + STREAMS))
        if asked(lab)[node] == before[node]:
            return before[node]


async def test_a_run_waits_for_its_hosts(
    lab_of: LabMaker, caplog: pytest.LogCaptureFixture
) -> None:
    async with lab_of(items=20) as lab:
        aggregate = await lab.undisturbed()
        folder = in_folder(lab, least=2, wait_s=60)
        with caplog.at_level("INFO"):
            begun = asyncio.create_task(lab.begin())
            for n, url in enumerate(lab.fleet.urls):
                wanted = f"{n} of 2 ready"
                await lab.until(partial(lambda w: w in caplog.text, wanted))
                assert not begun.done()
                (folder / f"node{n}").write_text(f"{url}\n")
            result = await asyncio.wait_for(lab.live(await begun), DEADLINE_S)
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=0)


async def test_hosts_that_do_not_come_leave_it_resumable(lab_of: LabMaker) -> None:
    async with lab_of(items=20) as lab:
        aggregate = await lab.undisturbed()
        folder = in_folder(lab, least=2, wait_s=0.05)
        (folder / "node1").write_text(f"{lab.fleet.urls[0]}\n")
        with pytest.raises(RunStoppedError, match="1 of 2 ready"):
            await lab.begin()
        assert not lab.out.exists()
        (folder / "node2").write_text(f"{lab.fleet.urls[1]}\n")
        begun = await lab.begin()
        (folder / "node1").unlink()
        with pytest.raises(RunStoppedError, match="1 of 2 ready"):
            await lab.live(begun)
        assert (await lab.live(overrides=("endpoints.least=1",))).exit_code == 0
        lab.assert_whole(aggregate, again=0)
