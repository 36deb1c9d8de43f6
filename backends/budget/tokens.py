"""Who counts the tokens of a run's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from ...configs.prices import provider_at
from ..core.protocols import Count
from ..discovery.connect import Serving
from ..fleet.endpoint import EndpointSpec
from .counting import TokenCounter

_ASKED: Final = 8
"""So many of the endpoints are asked; they serve the same model."""


def token_counter(serving: Serving) -> TokenCounter:
    """Return what counts the prompts' tokens; the caller closes it.

    Gateways and hosted services offer no tokenizer and are not sent the prompts in vain.

    Args:
        serving: The endpoints, and the model that they serve.
    """
    behind = serving.place is not None and serving.place.gateway is not None
    specs = () if behind else tuple(spec for spec in serving.specs if _is_server(spec))
    return TokenCounter(specs[:_ASKED], serving.model)


def exact_count(counter: TokenCounter) -> Count:
    """Return a function that counts a prompt's tokens exactly, or says None."""

    async def count(body: Mapping[str, Any]) -> int | None:
        tokens, exact = await counter.count(body)
        return tokens if exact else None

    return count


def _is_server(spec: EndpointSpec) -> bool:
    return provider_at(urlsplit(spec.url).hostname or "") is None
