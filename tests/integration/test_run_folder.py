"""The folder of a run is the one that the caller names: checkpoints contain no path to it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import RunControl
from langgraph.types import Command
from typing_extensions import TypedDict

from fanfold import ConfigurationError, RunContext, build_graph
from fanfold.backends.core.errors import FanfoldError
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.storage.run_folder import open_folder
from fanfold.graphs.map_reduce import build_bound_graph

pytestmark = pytest.mark.integration

THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}
ITEMS = 60


def settings(fleet: SimulatedFleet, **changes: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": ["score"], "properties": {"score": {"type": "number"}}}
    return {
        "name": "test",
        "task": {"prompt": "What is {x}?", "schema": schema},
        "endpoints": {"urls": list(fleet.urls)},
        "limits": {"streams": 8, "hedge": False},
        "shard": {"items": 5},
        "reduce": [{"op": "count"}],
    } | changes


def rows(count: int = ITEMS) -> list[dict[str, Any]]:
    return [{"id": f"i{n}", "x": f"thing {n}"} for n in range(count)]


def asked(fleet: SimulatedFleet) -> int:
    return int(fleet.stats()["totals"]["requests"])


def bytes_below(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if file.is_file():
                yield file, file.read_bytes()


def assert_no_path(paths: set[str], *folders: Path) -> None:
    """Assert that no file has one of the paths in it, as plain bytes."""
    looked = 0
    for file, data in bytes_below(*folders):
        looked += 1
        for path in paths:
            assert path.encode() not in data, f"{file} holds {path}"
    assert looked


async def drained(graph: Any, fleet: SimulatedFleet, given: Any, **more: Any) -> None:
    """Begin a run and stop it once some items are asked; the thread can go on."""
    control = RunControl()
    task = asyncio.create_task(
        graph.ainvoke(given, THREAD, control=control, durability="sync", **more)
    )
    while asked(fleet) < ITEMS // 4:
        assert not task.done(), await task
        await asyncio.sleep(0.005)
    control.request_drain("test")
    with pytest.raises(Exception, match="test"):
        await task
    assert asked(fleet) < ITEMS


@pytest.fixture
async def slow() -> Any:
    spec = SimulationSpec.fast(nodes=2, ttft_s=0.03, tpot_s=0.001, jitter=0.1)
    async with SimulatedFleet(spec) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_a_run_that_moved_goes_on_where_out_says(
    slow: SimulatedFleet, tmp_path: Path, kind: str
) -> None:
    """The caller's saver knows which run it is; the folder comes with the context."""
    config = settings(slow)
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "saver.sqlite")) as sqlite:
        saver: Any = InMemorySaver() if kind == "memory" else sqlite
        await drained(build_graph(config, checkpointer=saver), slow, {"items": rows()})
        (old,) = (tmp_path / "fanfold-runs").iterdir()
        new = tmp_path / "elsewhere" / "moved"
        new.parent.mkdir()
        old.rename(new)
        graph = build_graph(config, checkpointer=saver, trust_context=True)
        state = await graph.aget_state(THREAD)
        with pytest.raises(ConfigurationError, match=f"{state.values['run']['id']}.*set 'out'"):
            await graph.ainvoke(None, THREAD)
        end = await graph.ainvoke(None, THREAD, context=RunContext(out="elsewhere/moved"))
        assert end["progress"]["done"] == ITEMS
        assert asked(slow) == ITEMS
        assert Path(end["results"]["folder"]) == new
        assert not old.exists()
        if kind == "sqlite":
            assert_no_path({str(old), str(new), "elsewhere/moved"}, tmp_path / "saver.sqlite", new)


async def test_a_process_knows_where_its_runs_lie(
    slow: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same graph continues without a given folder, also in another working directory."""
    graph = build_graph(settings(slow), checkpointer=InMemorySaver(), trust_context=True)
    await drained(graph, slow, {"items": rows()}, context=RunContext(out="mine"))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    end = await graph.ainvoke(None, THREAD)
    assert Path(end["results"]["table"]).parent == tmp_path / "mine"
    assert asked(slow) == ITEMS
    assert not list((tmp_path / "deeper").iterdir())


async def test_another_process_finds_a_run_by_its_name(
    slow: SimulatedFleet, tmp_path: Path
) -> None:
    """A graph built anew, as after a restart, looks below fanfold-runs."""
    saver = InMemorySaver()
    await drained(build_graph(settings(slow), checkpointer=saver), slow, {"items": rows()})
    end = await build_graph(settings(slow), checkpointer=saver).ainvoke(None, THREAD)
    assert Path(end["results"]["folder"]).parent == tmp_path / "fanfold-runs"
    assert asked(slow) == ITEMS


async def test_the_folder_of_another_run_is_refused(slow: SimulatedFleet, tmp_path: Path) -> None:
    config, saver = settings(slow), InMemorySaver()
    await drained(build_graph(config, checkpointer=saver), slow, {"items": rows()})
    other = await build_graph(RunContext(config=config, out="other")).ainvoke({"items": rows(3)})
    before = asked(slow)
    graph: Any = build_graph(config, checkpointer=saver, trust_context=True)
    run = (await graph.aget_state(THREAD)).values["run"]["id"]
    with pytest.raises(ConfigurationError, match=f"other: this is the folder of run .*{run}"):
        await graph.ainvoke(None, THREAD, context={"out": "other"})
    for wrong, why in (("nowhere", "no such run folder"), (".", "not a run folder")):
        with pytest.raises(ConfigurationError, match=why):
            await graph.ainvoke(None, THREAD, context=RunContext(out=wrong))
    assert asked(slow) == before
    assert Path(other["results"]["folder"]) == tmp_path / "other"


@pytest.mark.parametrize("spelling", ["./out/", "out/../out", "link", "linked/out", "absolute"])
async def test_all_spellings_of_a_folder_are_one_run(
    slow: SimulatedFleet, tmp_path: Path, spelling: str
) -> None:
    config, saver = settings(slow), InMemorySaver()
    graph = build_graph(config, checkpointer=saver, trust_context=True)
    await drained(graph, slow, {"items": rows()}, context=RunContext(out="out"))
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "linked").symlink_to(tmp_path)
    out = str(tmp_path / "out") if spelling == "absolute" else spelling
    end = await graph.ainvoke(None, THREAD, context=RunContext(out=out))
    assert Path(end["results"]["folder"]) == tmp_path / "out"
    assert asked(slow) == ITEMS


async def test_the_working_directory_may_be_the_runs_folder(
    simulated: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir(mode=0o700)
    before = here.stat()
    monkeypatch.chdir(here)
    graph = build_graph(RunContext(config=settings(simulated), out="."))
    await graph.ainvoke({"items": rows(3)})
    end = await graph.ainvoke({})
    assert end["progress"]["done"] == 3 == asked(simulated)
    assert Path("provenance.json").exists()
    assert not open_folder(here).read_provenance()["earlier"]
    assert (here.stat().st_ino, here.stat().st_mode) == (before.st_ino, before.st_mode)


async def test_out_and_no_input_go_on_with_that_run(slow: SimulatedFleet) -> None:
    """As ``fanfold run --out`` does, on a thread of its own; another task is refused."""
    config = settings(slow)
    await drained(
        build_graph(config, checkpointer=InMemorySaver(), trust_context=True),
        slow,
        {"items": rows()},
        context={"out": "a"},
    )
    shutil.move("a", "b")
    other = config | {"task": {"prompt": "Why {x}?"}}
    with pytest.raises(ConfigurationError, match="differ from those of this run"):
        await build_graph(RunContext(config=other, out="b")).ainvoke({})
    with pytest.raises(ConfigurationError, match="contains other files"):
        await build_graph(RunContext(config=config, out="b")).ainvoke({"items": rows(3)})
    end = await build_graph(RunContext(config=config, out="b")).ainvoke({})
    assert end["progress"]["done"] == ITEMS == asked(slow)


class Parent(TypedDict, total=False):
    items: list[dict[str, Any]]
    progress: dict[str, Any]


async def test_a_subgraph_keeps_no_path_either(simulated: SimulatedFleet, tmp_path: Path) -> None:
    """Interrupted, resumed and finished below a parent whose saver is a file."""
    file = tmp_path / "saver.sqlite"
    config = settings(simulated, budget={"requests": 20})
    parent = StateGraph(Parent)
    parent.add_node("screen", build_graph(config, trust_context=True))
    parent.add_edge(START, "screen")
    parent.add_edge("screen", END)
    async with AsyncSqliteSaver.from_conn_string(str(file)) as saver:
        graph = parent.compile(checkpointer=saver)
        paused = await graph.ainvoke({"items": rows()}, THREAD)
        assert paused["__interrupt__"]
        end = await graph.ainvoke(Command(resume={"requests": 100}), THREAD)
        assert end["progress"]["done"] == ITEMS == asked(simulated)
        (folder,) = (tmp_path / "fanfold-runs").iterdir()
        assert_no_path({str(folder), str(folder.parent)}, file, folder)


async def test_an_error_in_a_checkpoint_names_no_path(
    simulated: SimulatedFleet, tmp_path: Path
) -> None:
    """LangGraph keeps a failed node's error; users still see the path in its message."""
    file, out = tmp_path / "saver.sqlite", tmp_path / "out"
    async with AsyncSqliteSaver.from_conn_string(str(file)) as saver:
        context = RunContext(config=settings(simulated), out=str(out))
        graph = build_bound_graph(context).compile(
            checkpointer=saver, interrupt_before=["dispatch"]
        )
        await graph.ainvoke({"items": rows()}, THREAD)
        (out / "journal" / "0001.jsonl").write_text("rubbish\n")
        with pytest.raises(FanfoldError, match=str(out)):
            await build_bound_graph(context).compile(checkpointer=saver).ainvoke(None, THREAD)
        errors = [repr(task.error) for task in (await graph.aget_state(THREAD)).tasks]
        assert any("the run folder/journal/0001.jsonl, line 1: " in error for error in errors)
        assert_no_path({str(out)}, file, out)


async def test_relative_paths_count_from_where_they_were_given(
    simulated: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may change its working directory between two invocations."""
    config, (a, b) = settings(simulated), (tmp_path / "a", tmp_path / "b")
    for folder in (a, b):
        folder.mkdir()
    saver = InMemorySaver()
    monkeypatch.chdir(a)
    bound: Any = build_graph(RunContext(config=config, out="bound"), checkpointer=saver)
    plain: Any = build_graph(config, checkpointer=saver, trust_context=True)
    first = await bound.ainvoke({"items": rows(3)}, thread("bound"))
    given = await plain.ainvoke({"items": rows(3)}, thread("1"), context={"out": "given"})
    monkeypatch.chdir(b)
    again = await bound.ainvoke({}, thread("bound"))
    other = await plain.ainvoke({"items": rows(3)}, thread("2"), context={"out": "given"})
    third = await plain.ainvoke({"items": rows(3)}, thread("3"), context=RunContext(out="third"))
    assert [Path(end["results"]["folder"]) for end in (first, again, given, other, third)] == [
        *(a / "bound", a / "bound", a / "given", b / "given", b / "third")
    ]


def thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name}}


async def test_a_thread_goes_on_in_a_copy(slow: SimulatedFleet, tmp_path: Path) -> None:
    """The checkpoint has the id of the run that was copied; the copy has one of its own."""
    config, saver = settings(slow), InMemorySaver()
    graph = build_graph(config, checkpointer=saver, trust_context=True)
    await drained(graph, slow, {"items": rows()}, context=RunContext(out="a"))
    done = asked(slow)
    shutil.copytree("a", "b")
    before = dict(bytes_below(tmp_path / "a"))
    end = await graph.ainvoke(None, THREAD, context=RunContext(out="b"))
    assert end["progress"]["done"] == ITEMS == asked(slow)
    assert Path(end["results"]["folder"]) == tmp_path / "b"
    assert dict(bytes_below(tmp_path / "a")) == before
    (run, other) = (open_folder(Path(name)).read_provenance() for name in "ab")
    assert other["earlier"] == [run["run"]] != [other["run"]]
    end = await build_graph(RunContext(config=config, out="a")).ainvoke({})
    assert end["progress"]["done"] == ITEMS
    assert asked(slow) == ITEMS + ITEMS - done


async def test_a_place_that_another_run_takes(slow: SimulatedFleet, tmp_path: Path) -> None:
    """What is known of a place is forgotten when a new run is made there."""
    graph: Any = build_graph(settings(slow), checkpointer=InMemorySaver(), trust_context=True)
    await drained(graph, slow, {"items": rows()}, context={"out": "a"})
    Path("a").rename("b")
    change = {"out": "a", "overrides": ["task.prompt=Why {x}?"]}
    other = await graph.ainvoke({"items": rows(3)}, thread("other"), context=change)
    assert "Why {x}?" in (tmp_path / "a" / "run.yaml").read_text()
    assert other["progress"]["done"] == 3
    with pytest.raises(ConfigurationError, match="a: this is the folder of run"):
        await graph.ainvoke(None, THREAD, context={"out": "a"})
    end = await graph.ainvoke(None, THREAD, context={"out": "b"})
    assert end["progress"]["done"] == ITEMS


async def test_a_bound_folder_of_a_graph_that_trusts_nothing(
    slow: SimulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner binds where the moved folder is; a relative one counts from there."""
    config, saver = settings(slow), InMemorySaver()
    await drained(build_graph(config, checkpointer=saver), slow, {"items": rows()})
    (old,) = (tmp_path / "fanfold-runs").iterdir()
    old.rename(tmp_path / "moved")
    graph: Any = build_graph(RunContext(config=config, out="moved"), checkpointer=saver)
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    with pytest.raises(ConfigurationError, match="out"):
        await graph.ainvoke(None, THREAD, context=RunContext(out="../moved"))
    end = await graph.ainvoke(None, THREAD)
    assert Path(end["results"]["folder"]) == tmp_path / "moved"
    assert end["progress"]["done"] == ITEMS == asked(slow)
