"""The picture in the README and in docs/langgraph.md is that of the graph."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from langchain_core.runnables.graph import Edge

from fanfold.graphs.item import item
from fanfold.graphs.map_reduce import graph

ROOT = Path(str(files("fanfold")))
BLOCK = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
LABELS = {"shard": 'shard["shard \u00d7 n"]'}


def line(edge: Edge) -> str:
    """Draw an edge; it leads to a subgraph's first node, and away from the whole subgraph."""
    source, target = edge.source, edge.target
    if group(source) != group(target):
        source = group(source) or source
    arrow = "-.->" if edge.conditional else "-->"
    return f"{source.rpartition(':')[2]} {arrow} {target.rpartition(':')[2]}"


def group(name: str) -> str:
    return name.partition(":")[0] if ":" in name else ""


def steps() -> dict[str, int]:
    """Return how many steps it takes from the start to each node."""
    found, edges = {"__start__": 0}, graph.get_graph(xray=True).edges
    for _ in edges:
        for edge in edges:
            if edge.source in found:
                found.setdefault(edge.target, found[edge.source] + 1)
    return found


def compact() -> str:
    """Draw what a scientist wants to see: no start and no end, the item graph inside the shard."""
    edges = sorted(graph.get_graph(xray=True).edges, key=lambda edge: steps()[edge.source])
    edges = [e for e in edges if e.source != "__start__" and not e.target.endswith("__end__")]
    inside = [e for e in edges if group(e.source) and group(e.source) == group(e.target)]
    lines, drawn = ["graph LR"], set[str]()
    for edge in (e for e in edges if e not in inside):
        add(lines, "  ", line(edge))
        if (name := group(edge.target)) and name not in drawn:
            drawn.add(name)
            lines.append(f"  subgraph {LABELS.get(name, name)}")
            for e in (e for e in inside if group(e.source) == name):
                add(lines, "    ", line(e))
            lines.append("  end")
    return "\n".join(lines) + "\n"


def add(lines: list[str], indent: str, edge: str) -> None:
    """Add an edge, to the line before it if that ends where it begins."""
    source, rest = edge.split(" ", 1)
    if lines[-1].startswith(indent) and lines[-1].endswith(f" {source}"):
        lines[-1] += f" {rest}"
    else:
        lines.append(indent + edge)


def test_the_readme_shows_the_graph() -> None:
    (shown,) = BLOCK.findall((ROOT / "README.md").read_text())
    assert shown == compact()


@pytest.mark.parametrize("nodes", [graph.get_graph(xray=True).nodes, item.get_graph().nodes])
def test_every_node_says_what_it_does(nodes: dict[str, object]) -> None:
    for name, node in nodes.items():
        if not name.endswith("__"):
            described = getattr(node, "metadata", None) or {}
            assert described["description"].endswith("."), name
