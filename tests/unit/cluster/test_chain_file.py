from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.cluster.chain import ChainFile, JobChain, next_job
from fanfold.backends.core.errors import JournalError


@pytest.fixture
def file(tmp_path: Path) -> ChainFile:
    return ChainFile(tmp_path / "cluster" / "chain.jsonl")


def submitted(file: ChainFile, job: str, after: str | None = None, **terms: object) -> None:
    by_hand = {"by_hand": after is None}
    terms = {"terms": {"scheduler": "slurm", **terms}} if after is None else {}
    file.append("submitted", job=job, nodes=2, walltime_s=3600, after=after, **by_hand, **terms)


def lived(file: ChainFile, job: str, before: int, done: int, code: int = 5) -> None:
    file.append("began", job=job, finished=before)
    file.append("ended", job=job, outcome="interrupted", code=code, finished=done)


def test_no_file_is_an_empty_chain(file: ChainFile) -> None:
    assert file.read() == JobChain()


def test_a_chain_is_told_from_its_events(file: ChainFile) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 10)
    submitted(file, "2", after="1")
    chain = file.read()
    assert [job.id for job in chain.jobs] == ["1", "2"]
    assert chain.jobs[0].finished_items == 10
    assert chain.jobs[0].wall_s >= 0
    assert chain.find_successor("1") == chain.jobs[1]
    assert chain.unfinished_jobs() == (chain.jobs[1],)


def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(file: ChainFile) -> None:
    submitted(file, "1")
    with file.path.open("ab") as stream:
        stream.write(b'{"v":1,"at":"2026')
    file.append("began", job="1", finished=3)
    chain = file.read()
    assert [job.id for job in chain.jobs] == ["1"]
    assert chain.jobs[0].before == 3


def test_another_version_is_an_error(file: ChainFile) -> None:
    file.path.parent.mkdir()
    file.path.write_text('{"v":2,"event":"began"}\n')
    with pytest.raises(JournalError, match="line 1: version 2"):
        file.read()


def test_it_goes_on_while_progress_is_made(file: ChainFile) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 10)
    assert next_job(file.read(), 90).is_due


@pytest.mark.parametrize(
    ("code", "why"),
    [(0, "finished"), (3, "finished"), (2, "wrong setting"), (4, "budget is spent")],
)
def test_exit_codes_that_end_it(file: ChainFile, code: int, why: str) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 10, code)
    found = next_job(file.read(), 90)
    assert not found.is_due
    assert why in found.reason


def test_nothing_left_ends_it(file: ChainFile) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 10, code=1)
    assert next_job(file.read(), 0).reason == "all items are finished"


def test_two_jobs_without_progress_end_it(file: ChainFile) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 10)
    submitted(file, "2", after="1")
    lived(file, "2", 10, 10)
    assert next_job(file.read(), 90).is_due
    submitted(file, "3", after="2")
    file.append("began", job="3", finished=10)
    assert next_job(file.read(), 90).is_due  # it runs: nobody knows yet
    file.append("lost", job="3", outcome="lost", finished=10)
    found = next_job(file.read(), 90)
    assert not found.is_due
    assert "2 jobs in a row finished no item" in found.reason


def test_two_jobs_that_lose_all_their_servers_end_it(file: ChainFile) -> None:
    """A few items of each do not make up for a job each time."""
    for job, after in (("1", None), ("2", "1")):
        assert next_job(file.read(), 90).is_due
        submitted(file, job, after)
        done = 10 * int(job)
        file.append("began", job=job, finished=done - 10)
        file.append("ended", job=job, outcome="…", code=5, finished=done, unserved=True)
    found = next_job(file.read(), 80)
    assert not found.is_due
    assert "2 jobs in a row finished no item or lost all their model servers" in found.reason


def test_submitting_by_hand_begins_anew(file: ChainFile) -> None:
    submitted(file, "1")
    lived(file, "1", 0, 0)
    submitted(file, "2", after="1")
    lived(file, "2", 0, 0)
    file.append("halted", why="no progress")
    assert not next_job(file.read(), 5).is_due
    submitted(file, "3")
    chain = file.read()
    assert next_job(chain, 5).is_due
    assert [job.id for job in chain.recent] == ["3"]


def test_a_halt_holds_whatever_jobs_do(file: ChainFile) -> None:
    submitted(file, "1")
    file.append("began", job="1", finished=0)
    file.append("halted", why="cancelled by fanfold cancel")
    file.append("ended", job="1", outcome="interrupted", code=5, finished=10)
    assert next_job(file.read(), 90).reason == "cancelled by fanfold cancel"


def test_most_jobs(file: ChainFile) -> None:
    submitted(file, "1", jobs=2)
    lived(file, "1", 0, 10)
    assert next_job(file.read(), 90).is_due
    submitted(file, "2", after="1")
    lived(file, "2", 10, 20)
    assert "its limit of 2 jobs" in next_job(file.read(), 80).reason


def test_most_node_hours(file: ChainFile) -> None:
    submitted(file, "1", node_hours=1.5)
    assert next_job(file.read(), 90).is_due  # nothing has begun
    lived(file, "1", 0, 10)
    found = next_job(file.read(), 90)  # nothing used, and one more job may take 2
    assert not found.is_due
    assert "one more job may take 2.00" in found.reason
