"""Estimates before a run: check, --like, and runs that begin with a pilot."""

from __future__ import annotations

import json
import os
import pty
import select
from pathlib import Path
from typing import Any

import pytest

from fanfold.graphs.run.estimate import _read_answered_prompts
from fanfold.tests.support.command_server import Command, started

from .conftest import Served, Shell
from .test_cli_terminal import read_terminal

pytestmark = pytest.mark.integration

TERMINAL = """
import fcntl, signal, termios
from fanfold.graphs.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C is a signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background
main()
"""

PRICE = {"prompt": 10, "completion": 20}


def priced(shell: Shell, items: int = 60, **sections: Any) -> None:
    rows = "".join(f"{n},text number {n}\n" for n in range(items))
    (shell.folder / "in.csv").write_text(f"id,text\n{rows}")
    given = {"model": {"max_tokens": 64, "price": PRICE}, "limits": {"hedge": False}}
    shell.write(**(given | sections))  # a slow machine's requests are not sent twice


def provenance(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "provenance.json").read_text())
    return found


def test_check_counts_a_sample_by_the_endpoints_tokenizer(shell: Shell, fleet: Served) -> None:
    priced(shell, budget={"usd": 0.05, "requests": 1000})
    urls = ",".join(fleet.urls)
    said = shell("check", "c.yaml", "--endpoints", urls, "--sample", "10")
    assert said.code == 0, said.err
    assert fleet.requests == 0
    assert "sample: 10 prompts, " in said.out
    assert "(by the endpoint's tokenizer)" in said.out
    assert (
        "price: $10 prompt, $20 completion per million tokens (model.price), SIMULATED" in said.out
    )
    assert "requests: 60 to 120 (with every repair)" in said.out
    assert "completion tokens: at most 7,680" in said.out
    assert "time: unknown without a measured latency" in said.out
    assert "budget: covers at least " in said.out
    assert "limited by budget.usd" in said.out

    data = json.loads(shell("check", "c.yaml", "--endpoints", urls, "--json").out)
    ran = json.loads(shell("run", "c.yaml", "--endpoints", urls, "--out", "r", "--json").out)
    assert data["sample"]["exact"]
    assert data["sample"]["items"] == 60
    assert ran["requests"] == 60
    assert ran["tokens"]["prompt"] == data["estimate"]["prompt_tokens"]["likely"]  # all counted
    assert data["estimate"]["requests"]["low"] == 60
    assert provenance("r")["price"]["prompt"] == 10

    like = json.loads(shell("check", "c.yaml", "--endpoints", urls, "--like", "r", "--json").out)
    assert like["estimate"]["measured"] == "60 items of r"
    assert like["estimate"]["completion_tokens"]["likely"] == ran["tokens"]["completion"]
    assert like["estimate"]["seconds"]["likely"] > 0
    cost = (10 * ran["tokens"]["prompt"] + 20 * ran["tokens"]["completion"]) / 1e6
    assert like["estimate"]["usd"]["likely"] == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_the_role_of_the_system_text_is_counted(shell: Shell, fleet: Served, role: str) -> None:
    urls = ",".join(fleet.urls)
    task = shell.config["task"] | {"system": "Be brief."}
    shell.write(task=task, model={"max_tokens": 64, "system_role": role})
    data = json.loads(shell("check", "c.yaml", "--endpoints", urls, "--json").out)
    ran = json.loads(shell("run", "c.yaml", "--endpoints", urls, "--out", "r", "--json").out)
    assert data["sample"]["exact"]
    assert ran["tokens"]["prompt"] == data["estimate"]["prompt_tokens"]["likely"]
    folder = Path("r").absolute()
    prompts = _read_answered_prompts(folder, 3)
    assert [[one["role"] for one in body["messages"]] for body, _ in prompts] == [
        ["user"] if role == "user" else ["system", "user"] if role == "system" else [role, "user"]
    ] * 3


def test_like_corrects_prompt_tokens_that_no_tokenizer_counts(
    shell: Shell, fleet: Served, tmp_path: Path
) -> None:
    """Answers of one run tell how many tokens its prompts have; the other's have twice the text."""
    priced(shell, items=40)
    assert shell("run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r").code == 0
    ran = json.loads(shell("status", "r", "--json").out)
    Path("r/provenance.json").write_text(json.dumps(provenance("r") | {"simulated": False}))
    model = {"name": "simulated-8b", "max_tokens": 64}
    priced(shell, items=80, model=model, endpoints={"file": str(tmp_path / "no"), "wait_s": 9})
    alone = json.loads(shell("check", "c.yaml", "--json").out)
    assert not alone["sample"]["exact"]
    like = json.loads(shell("check", "c.yaml", "--like", "r", "--json").out)
    assert like["sample"]["counted"] == "by length, corrected by the prompts of r"
    found = like["estimate"]["prompt_tokens"]
    real = 2 * ran["tokens"]["prompt"]
    assert found["low"] <= found["likely"] <= found["high"]
    assert found["likely"] == pytest.approx(real, rel=0.05)
    before = alone["estimate"]["prompt_tokens"]
    assert abs(found["likely"] - real) < abs(before["likely"] - real)
    assert found["high"] - found["low"] < before["high"] - before["low"]


@pytest.mark.parametrize(
    "budget", [{"usd": 1}, {"usd": 1, "requests": 30}, {"usd": 5, "tokens": 10**9}], ids=str
)
def test_without_a_price_check_still_estimates(
    shell: Shell, fleet: Served, budget: dict[str, Any]
) -> None:
    priced(shell, items=60, model={"max_tokens": 64}, budget=budget)
    urls = ",".join(fleet.urls)
    shell.patch.setenv("NO_COLOR", "1")
    free = {k: v for k, v in budget.items() if k != "usd"} or {"usd": "null"}
    settings = [f"--set=budget.{key}={value}" for key, value in free.items()]
    ran = shell(
        "run", "c.yaml", "--endpoints", urls, "--out", "r", "--set=budget.usd=null", *settings
    )
    assert ran.code in (0, 4), ran.err
    for more in ([], ["--like", "r"]):
        said = shell("check", "c.yaml", "--endpoints", urls, *more)
        assert said.code == 2
        assert "budget.usd is set, but the price of 'simulated-8b' is unknown" in said.err
        assert "price: unknown: " in said.out
        assert "prompt tokens: " in said.out
        assert "time" in said.out
        assert "budget.usd: cannot be estimated yet (the price is unknown)" in said.out
        assert ("budget: covers" in said.out) is (len(budget) > 1)
        told = json.loads(shell("check", "c.yaml", "--endpoints", urls, "--json", *more).out)
        assert told["estimate"]["prompt_tokens"]["likely"] > 0
        assert (told["estimate"]["seconds"] is None) is (not more)
        assert told["estimate"]["usd"] is None
        assert "model.price" in told["problem"]


def test_check_warns_of_prompts_that_do_not_fit(shell: Shell, fleet: Served) -> None:
    priced(shell, items=3, model={"max_tokens": 10_000_000})
    urls = ",".join(fleet.urls)
    said = shell("check", "c.yaml", "--endpoints", urls)
    assert said.code == 0
    assert "WARNING: the longest sampled prompt plus an answer of 10,000,000 tokens" in said.out
    priced(shell, items=3)
    assert "WARNING" not in shell("check", "c.yaml", "--endpoints", urls).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--like", "nowhere"], ["nowhere", "run"]),
        (["--like", "."], ["run"]),
        (["--set", "budget.usd=1", "--set", "model.price=null"], ["budget.usd", "model.price"]),
        (["--set", "model.price={prompt: 1}"], ["model.price", "completion"]),
        (["--sample", "0"], ["--sample"]),
    ],
)
def test_what_check_refuses(shell: Shell, arguments: list[str], words: list[str]) -> None:
    priced(shell)
    before = shell.files()
    said = shell("check", "c.yaml", *arguments)
    assert said.code == 2
    assert all(word in said.err for word in words), said.err
    assert "Traceback" not in said.err
    assert shell.files() == before


def test_a_budget_in_dollars_needs_a_price_before_anything_is_asked(
    shell: Shell, fleet: Served
) -> None:
    shell.write(budget={"usd": 1})
    said = shell("run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r")
    assert said.code == 2
    assert "budget.usd is set, but the price of 'simulated-8b' is unknown" in said.err
    assert fleet.requests == 0
    assert not Path("r").exists()


def test_answers_of_another_kind_say_nothing(shell: Shell) -> None:
    priced(shell, items=3)
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    about = provenance("r") | {"simulated": False}
    Path("r/provenance.json").write_text(json.dumps(about))
    said = shell("check", "c.yaml", "--like", "r")
    assert said.code == 2
    assert "its answers are real, and these endpoints are simulated" in said.err


def test_a_pilot_is_the_beginning_of_the_run(shell: Shell, fleet: Served) -> None:
    priced(shell, items=600, budget={"usd": 0.1})
    run = ("run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r", "--pilot", "10")
    said = shell(*run)
    assert said.code == 5
    assert fleet.requests == 10
    for text in (
        "SIMULATED: pilot: 10 of 600 items, spread over the input: 10 done, 0 failed",
        "10 requests, ",
        "latency: median ",
        "estimate for all 600 items:",
        "budget: covers about ",
        "no terminal to ask on; use --yes to continue without asking",
        "Resume with: fanfold resume r",
    ):
        assert text in said.err
    figures = said.err[said.err.index("SIMULATED: pilot") : said.err.index("Stopped")]
    assert max(map(len, figures.splitlines())) <= 120
    assert "pilot of 10 items; resumable" in shell("status", "r").out

    told = json.loads(shell(*run, "--json").out)  # again: nothing is asked
    assert fleet.requests == 10
    assert told["exit_code"] == 5
    assert told["pilot"]["items"] == told["pilot"]["done"] == 10
    assert told["pilot"]["left"] == 590
    assert told["pilot"]["estimate"]["budget"]["cap"] == "usd"
    ids = {json.loads(line)["id"] for line in shell("results", "r").out.splitlines()}
    assert len(ids) == 10
    assert min(map(int, ids)) < 60
    assert max(map(int, ids)) >= 540

    assert shell("resume", "r", "--quiet", "--set", "budget.usd=null").code == 0
    assert fleet.requests == 600
    assert len(shell("results", "r").out.splitlines()) == 600


def test_a_budget_may_end_within_the_pilot(shell: Shell, fleet: Served) -> None:
    priced(shell, budget={"requests": 6})
    run = ("run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r", "--pilot", "20")
    said = shell(*run)
    assert said.code == 4
    assert fleet.requests <= 6
    assert "fanfold resume r --budget-requests N" in said.err
    assert shell("resume", "r", "--budget-requests", "200", "--quiet").code == 0
    assert fleet.requests == 60


def test_yes_goes_on_and_the_aggregate_is_that_of_any_run(shell: Shell, fleet: Served) -> None:
    priced(shell)
    urls = ",".join(fleet.urls)
    straight = json.loads(shell("run", "c.yaml", "--endpoints", urls, "--out", "a", "--json").out)
    piloted = shell(
        "run", "c.yaml", "--endpoints", urls, "--out", "b", "--json", "--pilot", "7", "--yes"
    )
    assert piloted.code == 0, piloted.err
    told = json.loads(piloted.out)
    assert told["aggregate"] == straight["aggregate"]
    assert told["done"] == 60
    assert told["pilot"]["done"] == 7
    assert fleet.requests == 120
    outcomes = [life["outcome"] for life in provenance("b")["sessions"]]
    assert outcomes == ["pilot of 7 items; resumable", "finished"]


def test_a_pilot_of_all_items_asks_nothing(shell: Shell, fleet: Served) -> None:
    priced(shell, items=5)
    said = shell(
        "run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r", "--pilot", "20"
    )
    assert said.code == 0, said.err
    assert "pilot: 5 of 5 items" in said.err
    assert fleet.requests == 5


def test_a_pilot_shows_what_fails(shell: Shell) -> None:
    faults = [{"kind": "refusal", "p": 0.5, "draw": "item"}]
    simulated = {"nodes": 1, "time_scale": 50, "faults": faults}
    priced(shell, endpoints={"simulated": simulated})
    said = shell("run", "c.yaml", "--out", "r", "--pilot", "30", "--yes", "--quiet")
    assert said.code == 3
    lines = said.err.splitlines()
    (counts,) = (line for line in lines if "pilot: 30 of 60" in line)
    failed = int(counts.rpartition(": ")[2].split()[2])
    assert 0 < failed < 30
    assert f"  {failed} x RefusedAnswerError" in lines


def test_a_pilot_whose_items_are_worked_on_elsewhere(shell: Shell, fleet: Served) -> None:
    factory = "concurrent.futures:ThreadPoolExecutor"
    priced(shell, backend={"kind": "executor", "factory": factory, "workers": 2})
    said = shell(
        "run", "c.yaml", "--endpoints", ",".join(fleet.urls), "--out", "r", "--pilot", "4", "--yes"
    )
    assert said.code == 0, said.err
    assert "pilot: 4 of 60 items, spread over the input: 4 done, 0 failed" in said.err
    assert fleet.requests == 60


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\x03", 5)])
def test_on_a_terminal_somebody_is_asked(shell: Shell, answer: str, code: int) -> None:
    priced(shell, items=9)
    ours, theirs = pty.openpty()
    arguments = ("run", "c.yaml", "--out", "r", "--pilot", "3")
    command = Command(arguments, TERMINAL, new_session=True)
    with started(command, stdin=theirs, stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        said, sent = b"", False
        while select.select([ours], [], [], 60)[0] and (more := read_terminal(ours)):
            said += more
            if b"[y/N]" in said and not sent:
                os.write(ours, answer.encode())
                sent = True
        assert process.wait(60) == code
    os.close(ours)
    assert b"Continue with the other 6 items? [y/N]" in said
    assert (b"Stopped after the pilot" in said) is (code == 5)
    assert b"Traceback" not in said
