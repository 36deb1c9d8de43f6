"""fanfold: map-reduce LLM inference on HPC, as a LangGraph graph.

The public names are imported when they are first used, so that importing fanfold, as every
worker of a large machine does, costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.core.errors import ConfigurationError, FanfoldError
    from .backends.fleet.fleet import Fleet
    from .backends.fleet.langchain import ChatFleet
    from .backends.simulated.fleet import SimulatedFleet
    from .backends.simulated.spec import SimulationSpec
    from .graphs.analysis.results import ResultTable, RunResults, load_results
    from .graphs.build import build_graph
    from .graphs.context import RunContext
    from .graphs.integrations.academy import MapReduceAgent
    from .graphs.integrations.tool import as_tool

__all__ = [
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

_WHERE = {
    "ChatFleet": "backends.fleet.langchain",
    "ConfigurationError": "backends.core.errors",
    "FanfoldError": "backends.core.errors",
    "Fleet": "backends.fleet.fleet",
    "MapReduceAgent": "graphs.integrations.academy",
    "ResultTable": "graphs.analysis.results",
    "RunContext": "graphs.context",
    "RunResults": "graphs.analysis.results",
    "SimulatedFleet": "backends.simulated.fleet",
    "SimulationSpec": "backends.simulated.spec",
    "as_tool": "graphs.integrations.tool",
    "build_graph": "graphs.build",
    "load_results": "graphs.analysis.results",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _WHERE:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
