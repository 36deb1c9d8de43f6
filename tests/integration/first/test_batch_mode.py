"""Batch mode of FIRST: real runs against the stand-in, killed at every step of a batch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.tests.support.command_server import Command, CommandProcess, get_command_server
from fanfold.tests.support.first_gateway import (
    BatchSpec,
    DeploymentSpec,
    GatewayProcess,
    GatewaySpec,
    TokenSpec,
    make_spec,
    run_gateway_process,
)

pytestmark = pytest.mark.integration

DEADLINE_S = 120.0
LONG_S = 900.0
QUICK = {"poll_s": 0.1, "poll_most_s": 0.5, "gather_s": 0.3}
SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
}


class Lab:
    """Runs of one input in batches of one gateway, each in a process of its own."""

    def __init__(self, home: Path, gateway: GatewayProcess, items: int) -> None:
        self.home, self.gateway, self.items = home, gateway, items
        self.deadline_s = DEADLINE_S
        self.cpu_s = 0.0  # of all processes that have ended
        self.folder, self.out = home / "cluster", home / "run"
        self.folder.mkdir()
        rows = "".join(f"i{n},thing {n}\n" for n in range(items))
        (home / "in.csv").write_text(f"id,x\n{rows}")
        self.config: dict[str, Any] = {
            "name": "lab",
            "input": {"path": str(home / "in.csv"), "id": "id"},
            "task": {"prompt": "What is {x}?", "schema": SCHEMA},
            "model": {"name": "org/m"},
            "endpoints": {
                "first": {"base_url": gateway.url, "paths": ["sophia/vllm"], "token": "${LAB}"}
            },
            "backend": {"kind": "batch", "dir": str(self.folder), "lines": 40, **QUICK},
            "reduce": [{"op": "count"}],
        }

    @asynccontextmanager
    async def process(
        self, *arguments: str | Path, wrap: str | None = None
    ) -> AsyncIterator[CommandProcess]:
        environment = {**os.environ, "LAB": "good", "COLUMNS": "200"}
        command = Command(tuple(map(str, arguments)), wrap, env=environment)
        process = await get_command_server().start(command)
        try:
            yield process
        finally:
            process.kill()
            await process.communicate()
            self.cpu_s += process.cpu_s

    async def run(self, wrap: str | None = None, *options: str) -> tuple[int, str, str]:
        """Start the run, or resume it; return its exit code and what it printed."""
        if self.out.exists():
            arguments: tuple[str | Path, ...] = ("resume", self.out)
        else:
            file = self.home / "c.yaml"
            file.write_text(yaml.safe_dump(self.config))
            arguments = ("run", file, "--out", self.out)
        return await self.call(*arguments, *options, wrap=wrap)

    async def call(self, *arguments: str | Path, wrap: str | None = None) -> tuple[int, str, str]:
        async with self.process(*arguments, wrap=wrap) as process:
            out, err = await asyncio.wait_for(process.communicate(), self.deadline_s)
            assert process.returncode is not None
            return process.returncode, out.decode(), err.decode()

    async def batches(self) -> list[dict[str, Any]]:
        stats = await self.gateway.stats()
        return list(stats["batches"])

    async def until(self, is_true: Callable[[list[dict[str, Any]]], bool]) -> None:
        async with asyncio.timeout(self.deadline_s):
            while True:
                if is_true(await self.batches()):
                    return
                await asyncio.sleep(0.02)

    def records(self) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for file in (self.out / "journal").glob("*.jsonl"):
            lines = [json.loads(line) for line in file.read_bytes().splitlines()]
            found += [line for line in lines if "index" in line]
        return found

    async def check_whole(self, code: int, said: str, *, requests: int | None = None) -> None:
        """Every item once, no file submitted twice, no request in two batches."""
        assert code == 0, said
        counted = Counter(record["index"] for record in self.records())
        assert counted == Counter(range(self.items))
        assert all(record["status"] == "done" for record in self.records())
        batches = await self.batches()
        files = [batch["input_file"] for batch in batches]
        assert len(set(files)) == len(files)
        names = Counter(
            json.loads(line)["custom_id"]
            for file in files
            for line in Path(file).read_bytes().splitlines()
        )
        assert set(names.values()) == {1}
        assert len(names) == (self.items if requests is None else requests)
        run = json.loads((self.out / "provenance.json").read_bytes())["run"]
        assert {name.rsplit(":", 1)[0] for name in names} == {
            f"{run}:map:{n}" for n in range(self.items)
        }


@asynccontextmanager
async def open_lab(
    home: Path, items: int = 100, batch: BatchSpec | None = None, **spec: Any
) -> AsyncIterator[Lab]:
    chosen: GatewaySpec = make_spec(batch=batch or BatchSpec(), **spec)
    async with run_gateway_process(chosen) as gateway:
        yield Lab(home, gateway, items)


KILLED = """
import os, signal
from fanfold.backends.batch import files, service, transport
from fanfold.backends.storage.journal import Journal
from fanfold.graphs.cli.app import main
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def kill_at(owner, name, count):
    original, calls = getattr(owner, name), []
    def deadly(*a, **k):
        calls.append(1)
        if len(calls) == count:
            kill()
        return original(*a, **k)
    setattr(owner, name, deadly)
def kill_at_state(state, count, after):
    original, calls = files.BatchFolder.write, []
    def deadly(self, record):
        calls.extend([1] * (record.state == state))
        if len(calls) == count and not after:
            kill()
        original(self, record)
        if len(calls) == count:
            kill()
    files.BatchFolder.write = deadly
def kill_after_answer(owner, name):
    original = getattr(owner, name)
    async def deadly(*a, **k):
        await original(*a, **k)
        kill()
    setattr(owner, name, deadly)
{where}
main()
"""

KILLS = {
    "before the record": 'kill_at_state("posting", 1, after=False)',
    "after the answer": 'kill_after_answer(service.BatchService, "submit")',
    "at the second submission": 'kill_at_state("submitted", 2, after=True)',
    "while output is read": 'kill_at(files.BatchOutput, "add", 17)',
    "when it is collected": 'kill_at_state("collected", 1, after=True)',
    "while items are recorded": 'kill_at(Journal, "put", 23)',
}
QUICK_KILLS = {
    ("before the record", 200_000),
    ("after the answer", None),
    ("while output is read", 200_000),
    ("while items are recorded", None),
}
"""Kills that each test run repeats; the others are ``long``."""


KILL_CASES: list[Any] = [
    pytest.param(where, budget, marks=[] if (where, budget) in QUICK_KILLS else pytest.mark.long)
    for where in KILLS
    for budget in (None, 200_000)
]


@pytest.mark.parametrize(("where", "budget"), KILL_CASES)
async def test_killed_run_collects_what_it_submitted(
    tmp_path: Path, where: str, budget: int | None
) -> None:
    async with open_lab(tmp_path) as lab:
        if budget is not None:
            lab.config["budget"] = {"tokens": budget}
        code, _, said = await lab.run(KILLED.format(where=KILLS[where]))
        assert code == -signal.SIGKILL, said
        code, _, said = await lab.run()
        await lab.check_whole(code, said)
        _, out, _ = await lab.call("status", lab.out, "--json")
        state = json.loads(out)
        used = state["tokens"]["prompt"] + state["tokens"]["completion"]
        if budget is not None:
            # a killed session keeps a block of its spend log in doubt, never a whole batch
            assert state["in_doubt"]["tokens"] <= 2 * budget // 100 + 40 * 2
            spent = state["budget"]["tokens"]["spent"]
            assert used <= spent <= used + 2 * budget // 100 + 40 * 2


COUNTED = """
from fanfold.backends.budget.tokens import estimate_prompt_tokens
from fanfold.graphs.cli.app import main
from fanfold.graphs.run import open_run
def make_prompt_counter(counter):
    async def count(body):
        return estimate_prompt_tokens(body, ())
    return count
open_run.make_prompt_counter = make_prompt_counter
main()
"""
"""The prompt counter of the budget, where a tokenizer of the model is at hand."""


@pytest.mark.long
async def test_a_small_budget_makes_no_small_files_where_prompts_are_counted(
    tmp_path: Path,
) -> None:
    """By a byte per token it covers 17 requests at a time, by their tokens all of them."""
    async with open_lab(tmp_path, items=40) as lab:
        del lab.config["task"]["schema"]
        lab.config["task"]["prompt"] = f"{'a long question ' * 40} {{x}}?"
        lab.config["model"]["max_tokens"] = 50
        lab.config["budget"] = {"tokens": 14_000}
        code, out, said = await lab.run(COUNTED, "--json")
        await lab.check_whole(code, said)
        assert [batch["lines"] for batch in await lab.batches()] == [40]
        assert json.loads(out)["budget"]["tokens"]["spent"] <= 14_000


async def test_killed_between_record_and_post_waits_for_the_user(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=50) as lab:
        where = 'kill_at(service.BatchService, "submit", 1)'
        code, _, said = await lab.run(KILLED.format(where=where))
        assert code == -signal.SIGKILL, said
        async with lab.process("resume", lab.out) as process:
            assert process.stderr is not None
            async with asyncio.timeout(DEADLINE_S):
                while "it is not known whether the service has it" not in (
                    line := (await process.stderr.readline()).decode()
                ):
                    assert line
            assert await lab.batches() == []
            process.send_signal(signal.SIGINT)
            _, rest = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert "cannot be recalled" in rest.decode()
        state = lab.out / "batches" / "0001.json"
        assert f"delete {state}, and resume" in line
        state.unlink()
        code, _, said = await lab.run()
        await lab.check_whole(code, said)


async def test_killed_while_a_batch_runs(tmp_path: Path) -> None:
    async with open_lab(tmp_path, batch=BatchSpec(lines_per_s=20.0)) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        for _ in range(2):
            count = len(await lab.batches())
            arguments = ("resume", lab.out) if lab.out.exists() else ("run", file, "--out", lab.out)
            async with lab.process(*arguments) as process:
                await lab.until(
                    lambda now, count=count: (
                        len(now) > count  # type: ignore[misc]
                        and now[-1]["status"] == "running"
                        and now[-1]["lines"] > 3
                    )
                )
                process.kill()
                await process.wait()
        code, _, said = await lab.run()
        await lab.check_whole(code, said)
        assert len(await lab.batches()) == 3


async def test_a_stop_leaves_the_batch_to_the_service(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=30, batch=BatchSpec(lines_per_s=4.0)) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        async with lab.process("run", file, "--out", lab.out) as process:
            await lab.until(lambda now: bool(now) and now[0]["status"] == "running")
            process.send_signal(signal.SIGINT)
            _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert [one["status"] for one in await lab.batches()] == ["running"]
        told = "1 batch with 30 requests cannot be recalled and may cost up to"
        assert told in said.decode()
        assert f"Resume with: fanfold resume {lab.out}" in said.decode()
        assert "SIGINT: waiting for requests that were sent one by one; batches at the" in (
            said.decode()
        )
        assert "items in flight" not in said.decode()
        _, out, err = await lab.call("status", lab.out)
        assert "1 submitted, 0 in_doubt, 0 collected" in out
        assert told in err
        code, _, said_again = await lab.run()
        await lab.check_whole(code, said_again)
        assert len(await lab.batches()) == 1


async def test_missing_and_failed_lines_go_into_the_next_batch(tmp_path: Path) -> None:
    rules = BatchSpec(missing=0.1, failed=0.1)
    async with open_lab(tmp_path, items=80, batch=rules) as lab:
        code, out, said = await lab.run(None, "--json")
        assert code == 0, said
        assert json.loads(out)["done"] == 80
        batches = await lab.batches()
        assert [batch["lines"] for batch in batches[:2]] == [40, 40]
        lost = [
            sum(one["lines"] - one["custom_ids"] for one in batches),
            sum(batch["lines"] for batch in batches) - 80,
        ]
        assert 0 < lost[0] <= lost[1]
        stats = await lab.gateway.stats()
        single = [c for c in stats["calls"] if c["path"].endswith("/chat/completions")]
        twice = [r for r in lab.records() if r["requests"] > 2]
        assert len(single) == len(twice)  # after two batches: one by one


async def test_leftovers_of_batches_only(tmp_path: Path) -> None:
    rules = BatchSpec(missing=0.4)
    async with open_lab(tmp_path, items=40, batch=rules) as lab:
        lab.config["backend"]["leftovers"] = "batch"
        lab.config["limits"] = {"attempts": 2}
        code, out, said = await lab.run(None, "--json")
        counts = json.loads(out)
        assert counts["done"] + counts["failed"] == 40
        assert (counts["failed"] > 0) == (code == 3), said
        stats = await lab.gateway.stats()
        assert not [c for c in stats["calls"] if c["path"].endswith("/chat/completions")]
        failed = [r for r in lab.records() if r["status"] == "failed"]
        assert all(r["requests"] == 2 and "no line" in r["error"] for r in failed)


@pytest.mark.parametrize("missing", [pytest.param(0.0, marks=pytest.mark.long), 0.7])
async def test_an_outage_fails_few_items(tmp_path: Path, missing: float) -> None:
    """Without requests one by one, nothing else tells a broken service from bad items."""
    rules = BatchSpec(missing=missing, failed=1.0 - missing)
    async with open_lab(tmp_path, items=80, batch=rules) as lab:
        lab.config["backend"]["leftovers"] = "batch"
        lab.config["limits"] = {"attempts": 2}
        code, _, said = await lab.run()
        assert code == 5, said
        assert "failed in every batch; more than 5% of 200 look like an outage" in said
        assert [r["status"] for r in lab.records()] == ["failed"] * 10


async def test_some_items_that_fail_are_no_outage(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=400, batch=BatchSpec(failed=0.1)) as lab:
        lab.config["backend"] |= {"leftovers": "batch", "lines": 400}
        lab.config["limits"] = {"attempts": 2}
        code, _, said = await lab.run()
        assert code in {0, 3}, said
        assert len(lab.records()) == 400


async def test_repairs_are_requests_of_later_batches(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=20) as lab:
        # the server answers in free text, so that each answer is sent back once
        lab.config["model"]["extra_body"] = {"response_format": {"type": "text"}}
        lab.config["task"]["repairs"] = 1
        code, _, said = await lab.run()
        assert code == 3, said
        assert [batch["lines"] for batch in await lab.batches()] == [20, 20]
        assert {r["requests"] for r in lab.records()} == {2}
        names = [
            json.loads(line)["custom_id"].rsplit(":", 1)[1]
            for batch in await lab.batches()
            for line in Path(batch["input_file"]).read_bytes().splitlines()
        ]
        assert Counter(names) == {"1": 20, "2": 20}
        code, _, said = await lab.run(None, "--retry-failed")
        assert code == 3, said
        # a new try asks anew: the answers that failed are not used again
        assert [batch["lines"] for batch in await lab.batches()] == [20, 20, 20, 20]


@pytest.mark.long
async def test_a_batch_that_dies_keeps_its_answers(tmp_path: Path) -> None:
    rules = BatchSpec(lines_per_chunk=10, dies_after_lines=25)
    async with open_lab(tmp_path, items=40, batch=rules) as lab:
        code, out, said = await lab.run(None, "--json")
        assert code == 0, said
        assert json.loads(out)["done"] == 40
        assert "batch 1 failed: 20 answers, 0 failed, 20 missing" in said
        assert [batch["lines"] for batch in await lab.batches()] == [25, 20]


async def test_two_batches_without_an_answer_stop_the_run(tmp_path: Path) -> None:
    rules = BatchSpec(dies_after_lines=0, deaths=2)
    async with open_lab(tmp_path, items=20, batch=rules) as lab:
        code, _, said = await lab.run()
        assert code == 5
        assert "2 batches in a row brought no answer" in said
        stats = await lab.gateway.stats()
        assert not [c for c in stats["calls"] if c["path"].endswith("/chat/completions")]
        code, _, said = await lab.run()
        assert code == 0, said
        assert len(lab.records()) == 20


OTHER_FIRST = """
import json, urllib.request
from fanfold.backends.batch.service import BatchService
from fanfold.graphs.cli.app import main
submit, calls = BatchService.submit, []
async def after_another(self, *a):
    if not calls:
        urllib.request.urlopen(urllib.request.Request({url!r}, {body!r}, {headers!r})).close()
    calls.append(1)
    return await submit(self, *a)
BatchService.submit = after_another
main()
"""


async def test_waits_for_other_batches_of_the_user(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=20, batch=BatchSpec(lines_per_s=20.0)) as lab:
        other = tmp_path / "other.jsonl"
        body = {"model": "org/m", "messages": [{"role": "user", "content": "x"}]}
        lines = [{"custom_id": f"o{n}", "method": "POST", "body": body} for n in range(40)]
        other.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        order = {
            "model": "org/m",
            "input_file": str(other),
            "output_folder_path": str(tmp_path / "other.out"),
        }
        first = OTHER_FIRST.format(
            url=f"{lab.gateway.url}/sophia/vllm/v1/batches",
            body=json.dumps(order).encode(),
            headers={"Authorization": "Bearer good"},
        )
        code, _, said = await lab.run(first)
        assert code == 0, said
        assert "not accepted yet: HTTP 400 quota_exceeded" in said
        assert [batch["lines"] for batch in await lab.batches()] == [40, 20]


async def test_a_refused_batch_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    spec = make_spec()
    deployment = replace(spec.deployments[0], batches=False)
    async with run_gateway_process(make_spec(deployment)) as gateway:
        lab = Lab(tmp_path, gateway, 5)
        code, _, said = await lab.run()
        assert code == 5
        assert "the service refuses batch 1" in said
        assert "batch_unavailable" in said
        assert "cannot be recalled" not in said
        code, _, said = await lab.run()  # tried again with a new file, not kept for ever
        assert "the service refuses batch" in said


async def test_a_token_that_expires(tmp_path: Path) -> None:
    tokens = {"good": TokenSpec(), "old": TokenSpec(expires_s=0.0)}
    async with open_lab(tmp_path, items=5, batch=BatchSpec(lines_per_s=2.0), tokens=tokens) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        async with lab.process("run", file, "--out", lab.out) as process:
            await lab.until(bool)
            await lab.gateway.change(tokens={"good": None})
            _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert "the token is refused" in said.decode()
        assert "1 batch with 5 requests cannot be recalled" in said.decode()


async def test_output_that_this_machine_does_not_see(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=10, batch=BatchSpec(lines_per_s=10.0)) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        async with lab.process("run", file, "--out", lab.out) as process:
            await lab.until(lambda now: bool(now) and now[0]["status"] == "running")
            process.send_signal(signal.SIGSTOP)
            await lab.until(lambda now: now[0]["status"] == "completed")
            folder = Path((await lab.batches())[0]["output_folder_path"])
            hidden = folder.rename(folder.with_suffix(".hidden"))
            process.send_signal(signal.SIGCONT)
            _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 5
        assert "has no output here" in said.decode()
        hidden.rename(folder)
        code, _, said_again = await lab.run()
        await lab.check_whole(code, said_again)


async def test_foreign_lines_in_the_output_are_ignored(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=10, batch=BatchSpec(lines_per_s=5.0)) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        async with lab.process("run", file, "--out", lab.out) as process:
            await lab.until(lambda now: bool(now) and now[0]["status"] == "running")
            batch = (await lab.batches())[0]
            run = json.loads((lab.out / "provenance.json").read_bytes())["run"]
            answer = {"status_code": 200, "body": {"choices": [{"message": {"content": "{}"}}]}}
            names = [f"{run}:map:99:1", f"{run}:map:1:7", "other:map:1:1", 5, None, "x" * 9000]
            lines = [json.dumps({"custom_id": name, "response": answer}) for name in names]
            lines += ["{", "[" * 5000, "\x00", '"a"']
            extra = Path(batch["output_folder_path"]) / "extra.jsonl"
            extra.parent.mkdir(exist_ok=True)
            extra.write_text("\n".join(lines))
            _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        await lab.check_whole(process.returncode or 0, said.decode())
        assert "10 answers, 0 failed, 0 missing, 10 lines of others ignored" in said.decode()


async def test_one_deployment_answers_batches(tmp_path: Path) -> None:
    both = (DeploymentSpec(), DeploymentSpec(cluster="metis", framework="api", kind="direct"))
    async with run_gateway_process(make_spec(*both)) as gateway:
        lab = Lab(tmp_path, gateway, 5)
        del lab.config["endpoints"]["first"]["paths"]
        for command in ("check", "run"):
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(lab.config))
            options = ("--out", lab.out) if command == "run" else ()
            code, _, said = await lab.call(command, tmp_path / "c.yaml", *options)
            assert code == 2
            assert "2 serve the model (sophia/vllm, metis/api); set endpoints.first.paths" in said
        assert not lab.out.exists()
        lab.config["endpoints"]["first"]["paths"] = ["metis/api"]
        code, _, said = await lab.run()
        assert code == 0, said
        assert {batch["cluster"] for batch in await lab.batches()} == {"metis"}


async def test_check_counts_batches_and_finds_a_bad_folder(tmp_path: Path) -> None:
    async with open_lab(tmp_path, items=90) as lab:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(lab.config))
        code, out, said = await lab.call("check", file)
        assert code == 0, said
        assert "batches: 3 files with 90 requests, 40 at most in each, 1 at a time" in out
        code, out, _ = await lab.call("check", file, "--json")
        assert json.loads(out)["batches"] == 3
        for command in (("check", file), ("run", file, "--out", lab.out)):
            code, _, said = await lab.call(*command, "--set", f"backend.dir={tmp_path}/none")
            assert code == 2
            assert f"backend.dir: {tmp_path}/none is not a folder here" in said
        assert not lab.out.exists()


@pytest.mark.long
async def test_twenty_thousand_items_killed_at_every_step(tmp_path: Path) -> None:
    """20,000 items in files of 2,000: killed around submissions, while one runs, while one is read.

    The counts and CPU times are printed, so that ``pytest -s`` shows them.
    """
    async with open_lab(tmp_path, items=20_000, batch=BatchSpec(load_s=1.0)) as lab:
        lab.deadline_s = LONG_S
        lab.config["backend"]["lines"] = 2_000
        lab.config["budget"] = {"tokens": 50_000_000}
        steps = [
            "before the record",
            "at the second submission",
            "after the answer",
            "while output is read",
            "when it is collected",
            "while items are recorded",
        ]
        codes = list[int]()
        for step in steps:
            where = KILLS[step].replace("17", "1100").replace("23", "900")
            code, _, said = await lab.run(KILLED.format(where=where), "--quiet")
            codes.append(code)
            assert code == -signal.SIGKILL, (step, said)
        async with lab.process("resume", lab.out, "--quiet") as process:
            await lab.until(lambda now: now[-1]["status"] == "running")
            process.kill()
            await process.wait()
        killed_s = lab.cpu_s
        code, out, said = await lab.run(None, "--json")
        await lab.check_whole(code, said)
        last_s = lab.cpu_s - killed_s
        batches = await lab.batches()
        told = json.loads(out)
        _, out, _ = await lab.call("status", lab.out, "--json")
        state = json.loads(out)
        print(
            f"\nkills {len(codes) + 1}; batches {[batch['lines'] for batch in batches]}; "
            f"{told['done']} done in {told['seconds']} s of the last session; CPU s of clients: "
            f"{killed_s:.1f} killed, {last_s:.1f} last; in doubt {state['in_doubt']}"
        )
        assert told["done"] == 20_000
        assert sum(batch["lines"] for batch in batches) == 20_000
