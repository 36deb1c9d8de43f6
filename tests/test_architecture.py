"""The architecture: layers, no cycles, no globals, public names, cost of imports."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import fanfold
from fanfold.tests.benchmarks.__main__ import NAMES

ROOT, ROOMS = Path(str(files("fanfold"))), ("backends", "nodes", "graphs", "configs")
MODULES = sorted(p.relative_to(ROOT) for r in ROOMS for p in (ROOT / r).rglob("*.py"))
BACKENDS = {
    "backends.core",
    "backends.fleet",
    "backends.inputs",
    "backends.simulated",
    "backends.servers",
    "backends.storage",
    "backends.workers",
    "backends.discovery",
    "backends.budget",
    "backends.batch",
    "backends.cluster",
}
FLOORS: dict[str, set[str]] = {  # folder -> folders it may import; the longest prefix wins
    "backends": set(),
    "backends.core": set(),
    "configs": {"backends.core"},
    "backends.fleet": {"backends.core"},
    "backends.servers": {"backends.core"},
    "backends.inputs": {"backends.core", "configs"},
    "backends.simulated": {"backends.core", "configs"},
    "backends.storage": {"backends.core", "configs"},
    "backends.workers": {"backends.core", "configs"},
    "backends.discovery": {
        "backends.core",
        "backends.fleet",
        "backends.servers",
        "backends.simulated",
        "backends.storage",
        "configs",
    },
    "backends.budget": {
        "backends.core",
        "backends.discovery",
        "backends.fleet",
        "backends.storage",
        "configs",
    },
    "backends.batch": {
        "backends.budget",
        "backends.core",
        "backends.discovery",
        "backends.fleet",
        "backends.storage",
        "configs",
    },
    "backends.cluster": {"backends.core", "backends.servers", "configs"},
    "nodes": {"backends.core"},
    "graphs.remote": {"configs", "nodes"} | BACKENDS,
    "graphs.run": {"configs", "nodes", "graphs.remote"} | BACKENDS,
    "graphs": {"configs", "nodes", "graphs.remote", "graphs.run"} | BACKENDS,
    "graphs.analysis": {"configs", "nodes", "graphs.run"} | BACKENDS,
    "graphs.report": {"configs", "nodes", "graphs.analysis", "graphs.run"} | BACKENDS,
    "graphs.integrations": {"configs", "nodes", "graphs", "graphs.run"} | BACKENDS,
    "graphs.jobs": {"configs", "nodes", "graphs", "graphs.run", "graphs.remote"} | BACKENDS,
    "graphs.cli": {
        "configs",
        "nodes",
        "graphs",
        "graphs.run",
        "graphs.remote",
        "graphs.jobs",
        "graphs.analysis",
        "graphs.integrations",
        "graphs.report",
    }
    | BACKENDS,
}


READERS_NEED_NOT = {  # what the commands that read a run folder must not import
    "asyncio",
    "fanfold.backends.cluster.utilization",
    "fanfold.configs.loader",
    "fanfold.configs.models",
    "langchain_core",
    "langgraph",
    "numpy",
    "openai",
    "pyarrow",
    "pydantic",
}

ENDPOINTS_NEED_NOT = {  # what a command that only asks endpoints must not import
    "fanfold.backends.batch",
    "fanfold.backends.discovery.auto",
    "fanfold.backends.fleet.cache",
    "fanfold.backends.fleet.fleet",
    "fanfold.backends.servers.client",
    "fanfold.backends.storage.journal",
    "fanfold.backends.storage.response_cache",
    "fanfold.backends.workers",
    "fanfold.graphs.run.pipeline",
    "fanfold.graphs.run.prepare",
    "fanfold.nodes",
    "langchain_core",
    "langgraph",
    "multiprocessing",
    "openai",
    "yaml",
}


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return max((r for r in FLOORS if f"{module}.".startswith(f"{r}.")), key=len)


def imports(path: Path) -> set[str]:
    here, found = ("fanfold", *path.parts[:-1]), set[str]()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            full = ".".join(part for part in (base, node.module) if part)
            found |= {full} if node.module else {f"{full}.{a.name}" for a in node.names}
    return {n.removeprefix("fanfold.") for n in found if n.startswith("fanfold.")}


def test_folders_import_only_what_they_may() -> None:
    wrong = {
        str(path): sorted(
            name
            for name in imports(path)
            if room(name) not in FLOORS[room(dotted(path))] | {room(dotted(path))}
        )
        for path in MODULES
    }
    assert not {path: names for path, names in wrong.items() if names}


def test_no_cycles() -> None:
    edges = {dotted(p): imports(p) for p in MODULES}
    while leaves := {n for n, uses in edges.items() if not uses & edges.keys() - {n}}:
        edges = {n: uses for n, uses in edges.items() if n not in leaves}
    assert not edges


def test_no_module_changes_globals() -> None:
    changed = [
        str(path)
        for path in MODULES
        if any(
            isinstance(node, ast.Global) for node in ast.walk(ast.parse((ROOT / path).read_text()))
        )
    ]
    assert not changed


@pytest.mark.parametrize(
    "name", ["backends.core.types", "configs.loader", "nodes.item.steps", "graphs"]
)
def test_rooms_import_alone(name: str) -> None:
    """A fresh interpreter imports each room by itself, without a warning."""
    command = [sys.executable, "-W", "error", "-c", f"import fanfold.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert fanfold.__all__ == sorted(fanfold.__all__)
    assert fanfold.__all__ == [
        "ChatFleet",
        "ConfigurationError",
        "FanfoldError",
        "Fleet",
        "MapReduceAgent",
        "ResultTable",
        "RunContext",
        "RunResults",
        "SimulatedFleet",
        "SimulationSpec",
        "as_tool",
        "build_graph",
        "load_results",
    ]
    for name in fanfold.__all__:
        assert getattr(fanfold, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fanfold.nothing


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("fanfold", {"langgraph", "openai", "pyarrow"}),
        ("fanfold.graphs.analysis.results", {"langgraph", "openai", "pandas", "polars"}),
        ("fanfold.graphs.cli.app", {"langgraph", "pyarrow", "pydantic", "rich", "yaml"}),
        ("fanfold.graphs.cli.watch", {"langgraph", "langchain_core", "openai", "pyarrow"}),
        ("fanfold.graphs.cli.status", READERS_NEED_NOT),
        ("fanfold.graphs.cli.failures", READERS_NEED_NOT),
        ("fanfold.graphs.cli.resume", READERS_NEED_NOT - {"asyncio"}),
        ("fanfold.graphs.cli.runs", READERS_NEED_NOT),
        ("fanfold.graphs.jobs.chain", READERS_NEED_NOT),
        (
            "fanfold.graphs.cli.check",
            {*ENDPOINTS_NEED_NOT, "pyarrow.parquet", "rich", "tiktoken", "yaml"},
        ),
        (
            "fanfold.graphs.cli.endpoints",
            {*ENDPOINTS_NEED_NOT, "fanfold.backends.budget", "numpy", "pyarrow"},
        ),
        (
            "fanfold.graphs.cli.run",
            {
                "academy",
                "aiohttp.web",
                "fanfold.backends.workers.academy.backend",
                "fanfold.backends.workers.launched.backend",
                "globus_compute_sdk",
                "openai",
                "parsl",
                "tiktoken",
            },
        ),
        ("fanfold.configs.preset_files", {"pydantic", "yaml"}),
        ("fanfold.backends.simulated.serve", {"pydantic", "yaml"}),
        (
            "fanfold.graphs.worker",
            {
                "langgraph",
                "langchain_core",
                "langsmith",
                "openai",
                "pyarrow",
                "numpy",
                "rich",
                "tiktoken",
                "yaml",
                "fanfold.backends.batch.transport",
                "fanfold.backends.budget.tokens",
                "fanfold.backends.discovery.auto",
                "fanfold.backends.servers.client",
                "fanfold.backends.simulated.server",
                "fanfold.graphs.run.prepare",
            },
        ),
    ],
)
def test_importing_is_cheap(module: str, heavy: set[str]) -> None:
    """The face imports nothing heavy until a name is used; a worker only what a shard needs."""
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_aiohttp_is_imported_in_one_place() -> None:
    """A module that imports it first would make it read the certificate authorities."""
    wrong = [
        str(path)
        for path in MODULES
        if any(
            isinstance(node, ast.Import) and any(one.name == "aiohttp" for one in node.names)
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
        )
    ]
    assert wrong == ["backends/core/lazy_tls.py"]


def test_worker_imports_few_modules() -> None:
    """Each is a file that thousands of workers read at once; those of packages are not counted."""
    code = "import sys, fanfold.graphs.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = [name for name in done.stdout.split() if name.startswith("fanfold")]
    assert len(own) <= 145, own


def test_extras_are_all_in_dev() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (bundle,) = [d for d in extras["dev"] if d.startswith("fanfold[")]
    named = set(bundle.removeprefix("fanfold[").removesuffix("]").split(","))
    assert named == extras.keys() - {"dev"}


def test_every_benchmark_can_be_named() -> None:
    texts = {file.stem: file.read_text() for file in (ROOT / "tests" / "benchmarks").glob("*.py")}
    assert {name for name, text in texts.items() if "def measure(" in text} == set(NAMES)
