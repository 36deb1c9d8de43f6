"""The fleet: many endpoints behind one chat model.

``Fleet`` balances, repeats and accounts; ``ChatFleet`` is the LangChain model over it;
``FleetModel`` and ``LangChainModel`` are the lower and the upper door for fanfold's own nodes.
Names are imported when they are first used: the simulated fleet below needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .address import ApiKey, EndpointSpec
    from .chat import ChatFleet
    from .door import FleetModel
    from .endpoint import Endpoint
    from .fleet import Fleet
    from .nodelist import expand_slurm, hosts_to_specs, parse_pbs
    from .params import ModelParams
    from .policy import (
        AffinityPolicy,
        BreakerPolicy,
        FleetPolicy,
        HedgePolicy,
        LanePolicy,
        LoadPolicy,
        PacePolicy,
        RetryPolicy,
        TimeoutPolicy,
    )
    from .probe import Checked, Found, check_models, discover
    from .sources import parse_endpoints_file, read_endpoints_file
    from .stats import EndpointReport, FleetHealth
    from .upper import LangChainModel

_MODULES: Final = {
    "address": ("ApiKey", "EndpointSpec"),
    "chat": ("ChatFleet",),
    "door": ("FleetModel",),
    "upper": ("LangChainModel",),
    "endpoint": ("Endpoint",),
    "fleet": ("Fleet",),
    "nodelist": ("expand_slurm", "hosts_to_specs", "parse_pbs"),
    "params": ("ModelParams",),
    "policy": (
        "AffinityPolicy",
        "BreakerPolicy",
        "FleetPolicy",
        "HedgePolicy",
        "LanePolicy",
        "LoadPolicy",
        "PacePolicy",
        "RetryPolicy",
        "TimeoutPolicy",
    ),
    "probe": ("Checked", "Found", "check_models", "discover"),
    "sources": ("parse_endpoints_file", "read_endpoints_file"),
    "stats": ("EndpointReport", "FleetHealth"),
}

__all__ = [
    "AffinityPolicy",
    "ApiKey",
    "BreakerPolicy",
    "ChatFleet",
    "Checked",
    "Endpoint",
    "EndpointReport",
    "EndpointSpec",
    "Fleet",
    "FleetHealth",
    "FleetModel",
    "FleetPolicy",
    "Found",
    "HedgePolicy",
    "LanePolicy",
    "LangChainModel",
    "LoadPolicy",
    "ModelParams",
    "PacePolicy",
    "RetryPolicy",
    "TimeoutPolicy",
    "check_models",
    "discover",
    "expand_slurm",
    "hosts_to_specs",
    "parse_endpoints_file",
    "parse_pbs",
    "read_endpoints_file",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
