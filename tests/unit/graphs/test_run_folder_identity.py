"""Which folder a run is in: by device and inode, and not by anything written down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fanfold
from fanfold.backends.cluster.chain import chain_file
from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import ItemCounts
from fanfold.backends.storage.run_folder import (
    RunFolder,
    create_folder,
    get_own_ids,
    get_run_ids,
    is_folder_of_run,
    place_to_be,
)
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE
from fanfold.configs.loader import load_config, make_portable
from fanfold.graphs.run.prepare import describe_session, ensure_run_identity
from fanfold.tests.conformance.journal_checks import sample


def made(path: Path) -> RunFolder:
    with create_folder(path) as folder:
        place = place_to_be(folder)
        folder.write_provenance({"run": "one", "earlier": [], "place": place, "sessions": []})
        (folder.path / TASK_LOG_FILE).write_text("{}\n")
        for end in ("", "-wal", "-shm"):
            (folder.path / f"checkpoints.sqlite{end}").touch()
    return RunFolder(path)


def test_a_folder_keeps_its_run_wherever_it_is_moved(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    assert ensure_run_identity(folder)["run"] == "one"
    (tmp_path / "b").mkdir()
    moved = RunFolder(folder.path.rename(tmp_path / "b" / "c"))
    (tmp_path / "link").symlink_to(moved.path)
    for path in (moved.path, tmp_path / "link", tmp_path / "b" / ".." / "b" / "c"):
        assert get_run_ids(ensure_run_identity(RunFolder(path))) == ("one",)
    assert moved.checkpoints.exists()
    assert (moved.path / TASK_LOG_FILE).exists()


def test_copies_get_ids_of_their_own_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = made(tmp_path / "a")
    shutil.copytree(original.path, tmp_path / "b")
    shutil.copytree(original.path, tmp_path / "c")
    b, c = RunFolder(tmp_path / "b"), RunFolder(tmp_path / "c")
    first = get_run_ids(ensure_run_identity(b))
    assert "copied from the folder of run one" in caplog.text
    assert first[1:] == ("one",)
    assert get_run_ids(ensure_run_identity(b)) == first
    assert get_run_ids(ensure_run_identity(c))[0] not in first
    shutil.copytree(b.path, tmp_path / "d")
    assert get_run_ids(ensure_run_identity(RunFolder(tmp_path / "d")))[1:] == first
    for folder in (b, c):
        assert sorted(p.name for p in folder.path.iterdir()) == ["journal", "provenance.json"]
        assert is_folder_of_run(folder.path, "one")
    assert get_run_ids(ensure_run_identity(original)) == ("one",)
    assert original.checkpoints.exists()
    assert not is_folder_of_run(original.path, first[0])


def test_own_ids_are_those_before_a_change_of_the_device(tmp_path: Path) -> None:
    """They tell whether files outside the folder are its own or those of the original."""

    def renumbered(folder: RunFolder) -> tuple[str, ...]:
        about = folder.read_provenance()
        about["place"]["device"] += 1
        folder.write_provenance(about)
        return get_own_ids(ensure_run_identity(folder))

    original = made(tmp_path / "a")
    assert renumbered(original)[1:] == ("one",)
    twice = renumbered(original)
    assert twice[2:] == ("one",)
    shutil.copytree(original.path, tmp_path / "b")
    copy = RunFolder(tmp_path / "b")
    about = ensure_run_identity(copy)
    assert get_own_ids(about) == (about["run"],)
    assert get_run_ids(about)[1:] == twice
    assert renumbered(copy)[1:] == (about["run"],)


def test_a_copy_that_cannot_be_settled_stays_one(tmp_path: Path) -> None:
    """What was begun is done again: the id comes last."""
    shutil.copytree(made(tmp_path / "a").path, tmp_path / "b")
    copy = RunFolder(tmp_path / "b")
    (copy.path / TASK_LOG_FILE).unlink()
    (copy.path / TASK_LOG_FILE).mkdir()
    with pytest.raises(JournalError, match="cannot remove files that a copied run must not keep"):
        ensure_run_identity(copy)
    assert get_run_ids(copy.read_provenance()) == ("one",)
    (copy.path / TASK_LOG_FILE).rmdir()
    assert get_run_ids(ensure_run_identity(copy))[1:] == ("one",)


@pytest.mark.parametrize("known", ["one", ("two", "one")])
async def test_a_journal_of_an_earlier_id_is_the_runs_own(tmp_path: Path, known: Any) -> None:
    ledger = Journal(tmp_path, "one", 3)
    ledger.start_session("test", 0.001)
    ledger.put(sample(1))
    await ledger.aclose()
    with Journal(tmp_path, known, 3) as read:
        assert read.count_items() == ItemCounts(done=1, failed=0, open=2)
    with pytest.raises(JournalError, match="belongs to run 'one', not to 'two'"):
        Journal(tmp_path, ("two", "three"), 3)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("{run}/cluster/servers", "./cluster/servers"),
        ("{run}/../run/x", "./x"),
        ("{link}/x", "./x"),
        ("{run}", "./."),
        ("{run}-other/x", "{run}-other/x"),
        ("{run}/../x", "{run}/../x"),
        ("$SERVERS/x", "$SERVERS/x"),
    ],
)
@pytest.mark.parametrize("key", ["endpoints.file", "endpoints.hosts", "cache", "backend.registry"])
def test_paths_below_the_folder_are_kept_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kept: str, key: str
) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    run.mkdir()
    link.symlink_to("run")
    monkeypatch.chdir(run)
    section, _, name = key.partition(".")
    value: Any = text.format(run=run, link=link)
    plain: dict[str, Any] = {section: {name: [value] if name == "hosts" else value}}
    plain = plain if name else {section: value}
    found = make_portable(plain, Path())[section]
    found = found[name] if name else found
    assert found == ([kept.format(run=run)] if name == "hosts" else kept.format(run=run))
    assert value in (plain[section] if not name else plain[section][name])


def test_settings_are_read_where_the_folder_lies(tmp_path: Path) -> None:
    """What is written for one place is absolute again when it is read in another."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    given = {"task": {"prompt": "x"}, "endpoints": {"file": str(run / "servers")}}
    plain = load_config(given).plain
    (run / "run.yaml").write_bytes(orjson.dumps(make_portable(plain, run)))
    assert load_config(run / "run.yaml").plain == plain
    run.rename(moved)
    assert load_config(moved / "run.yaml").plain["endpoints"]["file"] == str(moved / "servers")


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["resume", "."], ["resume", "DIR"]),
        (["resume", "{run}/"], ["resume", "DIR"]),
        (["resume", "../link", "--json"], ["resume", "DIR", "--json"]),
        (["run", "c.yaml", "--out={link}"], ["run", "c.yaml", "--out=DIR"]),
        (["run", "c.yaml", "--out", "../run"], ["run", "c.yaml", "--out", "DIR"]),
        (["run", "quickstart", "--out", "quickstart"], ["run", "quickstart", "--out", "DIR"]),
        (["resume", "quickstart"], ["resume", "DIR"]),
        (["--set", "cache={run}/kept"], ["--set", "cache=DIR/kept"]),
        (["--set", "node.serve=x --log {run}/log"], ["--set", "node.serve=x --log DIR/log"]),
        (["--endpoints", "http://h:1/v1"], ["--endpoints", "http://h:1/v1"]),
        (["--input", "{run}-in.csv"], ["--input", "{run}-in.csv"]),
    ],
)
def test_commands_are_kept_without_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], kept: list[str]
) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    run.mkdir()
    link.symlink_to("run")
    for name in ("run", "quickstart"):  # a folder with the name of the command, or of a preset
        (run / name).symlink_to(".")
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["fanfold", *(a.format(run=run, link=link) for a in typed)])
    found = describe_session(RunFolder(Path("..", "run")))["command"]
    assert found == ["fanfold", *(a.format(run=run) for a in kept)]


def test_a_session_names_the_commit_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(fanfold.__file__).resolve().parent
    if not (root / ".git").exists():
        pytest.skip("fanfold does not run from a checkout")
    monkeypatch.chdir(tmp_path)
    head = subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True)
    git = describe_session(RunFolder(tmp_path))["git"]
    assert head.strip() in git["fanfold"]
    assert git["workdir"] is None


def test_jobs_of_the_folder_that_was_copied_are_foreign(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one = chain_file(tmp_path / "a")
    common: dict[str, Any] = {"nodes": 1, "walltime_s": 60, "terms": {"site": "s"}}
    one.append("submitted", job="1", after=None, by_hand=True, **common)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = chain_file(tmp_path / "b")
    other.append("submitted", job="2", after=None, by_hand=True, **common)
    assert [job.foreign for job in other.read().jobs] == [True, False]
    assert [job.id for job in other.read().unfinished_jobs()] == ["2"]
    (tmp_path / "a").rename(tmp_path / "c")
    assert [job.id for job in chain_file(tmp_path / "c").read().unfinished_jobs()] == ["1"]


@given(st.lists(st.sampled_from("ab."), min_size=1, max_size=5).map("/".join))
def test_relative_paths_read_back_are_the_same_place(path: str) -> None:
    """Whatever the path below the folder, reading resolves to where it pointed."""
    folder = Path("/nowhere/run")
    plain = {"cache": f"{folder}/{path}"}
    (kept,) = make_portable(plain, folder).values()
    assert kept.startswith("./")
    assert (folder / kept).resolve() == Path(plain["cache"]).resolve()


def test_a_new_folder_at_a_symbolic_link(tmp_path: Path) -> None:
    """A link to an empty folder stays a link; one of another run's folder is refused."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    folder = made(tmp_path / "link")
    assert ensure_run_identity(folder)["run"] == "one"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "provenance.json").exists()
    with pytest.raises(ConfigurationError, match="another process or invocation"):
        made(tmp_path / "link")
