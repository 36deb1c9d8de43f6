"""``cascade`` over two real fleets whose truth is known: a small model with errors, a large one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientSession, web

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.integration.runs.test_pipeline import STREAMS, begin, command, has_lines, outputs
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

ITEMS = 150
LABEL = {
    "prompt": "Which kind is {x}?",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "enum": ["a", "b", "c"]}},
    },
}


@asynccontextmanager
async def cascaded(lab: Lab, accuracy: float, **spec: Any) -> AsyncIterator[SimulatedFleet]:
    """Give the lab a stage with a cascade, whose small model has a fleet of its own."""
    known = {"model": "small", "responder": "labels", "accuracy": accuracy}
    async with SimulatedFleet(SimulationSpec.fast(nodes=1, **known, **spec)) as small:
        for key in ("task", "reduce"):
            del lab.config[key]
        cascade = {
            "field": "kind",
            "small": {"model": {"name": "small"}, "endpoints": {"urls": list(small.urls)}},
            "target": 0.9,
        }
        lab.config |= {
            "model": {"max_tokens": 100},
            "limits": {"streams": STREAMS * 8, "hedge": False},
            "stages": [{"name": "label", "map": LABEL, "cascade": cascade}],
        }
        yield small


def read_labels(root: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(root / "stages/label/results.parquet").to_pylist())


def count_asked(fleet: SimulatedFleet) -> tuple[int, int]:
    """Return the questions that a fleet was asked, and how many of them again."""
    asked = [int(one["asked"]) for one in fleet.stats(prompts=True)["prompts"].values()]
    return len(asked), sum(asked) - len(asked)


async def test_killed_in_each_kind_of_level_it_gives_the_same_answers(lab_of: LabMaker) -> None:
    async with (
        lab_of(items=ITEMS, ttft_s=0.02, responder="labels") as lab,
        cascaded(lab, accuracy=0.75, ttft_s=0.02) as small,
    ):
        said = await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        (label,) = said["stages"]
        report = label["report"]
        rows = read_labels(lab.home / "undisturbed")
        models = [row["model"] for row in rows]
        assert (models.count("small"), models.count("simulated-8b")) == (
            report["small"],
            report["large"],
        )
        assert report["small"] > 20
        assert report["lines"][0].startswith("agrees with simulated-8b in kind on at least 90 %")
        assert all(0 < row["certainty"] <= 1 for row in rows)
        assert [row["id"] for row in rows] == [f"i{n}" for n in range(ITEMS)]
        levels = [level["level"] for level in label["levels"]]
        lab.fleet.reset()
        small.reset()
        arguments: tuple[str, ...] = ()
        kills = ("small", "sample 1", "large")
        for level in kills:
            folder = lab.out / f"stages/label/levels/{levels.index(level) + 1}"
            async with lab.process(*arguments) as process:
                await lab.until(partial(has_lines, folder))
                process.kill()
                assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
            await lab.until(lab.fleet_is_idle)
            arguments = ("resume", str(lab.out))
        again = await command(lab, "resume", str(lab.out))
        assert again["stages"][0]["report"] == report
        assert outputs(lab.out) == expected
        assert count_asked(lab.fleet)[0] == report["large"]
        assert count_asked(lab.fleet)[1] <= 2 * lab.config["limits"]["streams"]
        assert count_asked(small)[0] == ITEMS
        assert count_asked(small)[1] <= 3 + lab.config["limits"]["streams"]


async def test_a_server_that_refuses_log_probabilities_is_asked_for_samples(
    lab_of: LabMaker,
) -> None:
    refused = list[str]()

    async def answer(request: web.Request) -> web.Response:
        data = await request.read()
        if data and "logprobs" in orjson.loads(data):
            refused.append(request.path)
            error = {"message": "logprobs is not supported by this engine"}
            return web.json_response({"error": error}, status=400)
        url = f"{server}{request.path}"
        async with (
            ClientSession() as session,
            session.request(request.method, url, data=data or None) as response,
        ):
            body = await response.read()
            return web.Response(body=body, content_type="application/json")

    async with (
        lab_of(items=20, ttft_s=0.0, responder="labels") as lab,
        cascaded(lab, accuracy=0.75) as small,
    ):
        server = small.urls[0].partition("/node")[0].removesuffix("/v1")
        app = web.Application()
        app.add_routes([web.route("*", "/{path:.*}", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        cascade = lab.config["stages"][0]["cascade"]
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        cascade["small"]["endpoints"] = {"urls": [small.urls[0].replace(server, base)]}
        lab.config["stages"][0]["map"] = {**LABEL, "repairs": 0}  # they are reserved, too
        lost = lab.config["limits"]["streams"] + 3 * 2  # in flight, and steps of the spend log
        lab.config["budget"] = {"requests": 20 * 6 + 3 + 3 + lost}
        try:
            async with lab.process() as process:
                await lab.until(partial(has_lines, lab.out / "stages/label/levels/2"))
                process.kill()
                await process.wait()
            said = await command(lab, "resume", str(lab.out))
        finally:
            await runner.cleanup()
    (label,) = said["stages"]
    assert (label["state"], label["results"], label["failed"]) == ("finished", 20, 0)
    assert label["report"]["samples"] == 5
    assert "agreement of 5 answers" in " ".join(label["report"]["lines"])
    assert 0 < len(refused) <= 3  # in the first level of the first session only
