"""The fleet: many endpoints behind one chat model.

``Fleet`` balances, repeats and accounts; ``ChatFleet`` is the LangChain model over it;
``FleetModel`` and ``LangChainModel`` are the lower and the upper door for fanfold's own nodes.
"""

from __future__ import annotations

from .chat import ChatFleet
from .door import FleetModel, LangChainModel
from .endpoint import ApiKey, Endpoint, EndpointSpec
from .fleet import Fleet
from .params import ModelParams
from .policy import FleetPolicy, RetryPolicy, TimeoutPolicy
from .probe import Checked, Found, check_models, discover
from .sources import parse_endpoints_file

__all__ = [
    "ApiKey",
    "ChatFleet",
    "Checked",
    "Endpoint",
    "EndpointSpec",
    "Fleet",
    "FleetModel",
    "FleetPolicy",
    "Found",
    "LangChainModel",
    "ModelParams",
    "RetryPolicy",
    "TimeoutPolicy",
    "check_models",
    "discover",
    "parse_endpoints_file",
]
