"""Find the price of calls: in the settings, or in fanfold's list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from ...configs.prices import ListedPrice, find_listed_price, find_provider_name, list_priced_hosts
from ..core.errors import ConfigurationError, NoEndpointError
from ..core.money import TokenPrices
from .price import Price

if TYPE_CHECKING:
    from ...configs.models import RunConfig
    from ..fleet.endpoint import EndpointSpec

_STANDARD: Final = frozenset({None, "auto", "default"})
"""Service tiers at the listed prices."""


def look_up_price(config: RunConfig, model: str, simulated: bool) -> Price | None:
    """Return the price of a model where the settings say it is served; may read a file.

    ``model.price`` comes first. fanfold's own list applies only to calls that go to the provider,
    by host name: a model of the same name on other nodes has no listed price.

    Args:
        config: The settings.
        model: The model's name, as selected for the run.
        simulated: Whether the fleet is simulated; such a fleet has a price only by
            ``model.price``.
    """
    given = config.model.price
    if given is not None and given.prompt is not None:
        return Price(
            given.prompt,
            given.cached_prompt,
            given.completion,
            given.node_hour,
            simulated=simulated,
        )
    found = None if simulated else _from_list(config, model)
    node_hour = None if given is None else given.node_hour
    if isinstance(found, ListedPrice):
        return Price(
            found.prompt,
            found.cached_prompt,
            found.completion,
            node_hour,
            found.source,
            found.provider,
            found.date,
            found.longest_prompt,
        )
    if node_hour is not None:
        return Price(node_hour=node_hour, simulated=simulated)
    return None


def find_model_price(config: RunConfig, model: str, simulated: bool) -> Price | None:
    """Return the price from :func:`look_up_price`, which a budget in dollars requires.

    Raises:
        ConfigurationError: ``budget.usd`` is set and the price is unknown; the message says what
            to add.
    """
    found = look_up_price(config, model, simulated)
    if found is None and config.budget.usd is not None:
        raise ConfigurationError(describe_missing_price(config, model, simulated))
    return found


def find_token_prices(config: RunConfig, model: str, simulated: bool) -> TokenPrices | None:
    """Return the price of calls from :func:`find_model_price`; None if unknown.

    Raises:
        ConfigurationError: See :func:`find_model_price`.
    """
    found = find_model_price(config, model, simulated)
    return None if found is None else found.token_prices


def describe_missing_price(config: RunConfig, model: str, simulated: bool) -> str:
    """Return why a budget in dollars cannot be used, and what to add."""
    return (
        f"budget.usd is set, but the price of {model!r} is unknown: "
        f"{explain_no_price(config, model, simulated)}. Add model.price, e.g. "
        "--set 'model.price={prompt: 0.5, completion: 1.5}' (dollars per million tokens) or "
        "--set 'model.price={node_hour: 2}' (nodes paid by time); or limit budget.tokens, "
        "budget.requests or budget.node_hours in place of dollars"
    )


def _from_list(config: RunConfig, model: str) -> ListedPrice | str:
    """Return the listed price, or why there is none."""
    tier = config.model.extra_body.get("service_tier")
    if tier not in _STANDARD:
        return f"the listed prices are not those of service_tier {tier!r}"
    try:
        specs = [] if config.backend.node_endpoints else _list_named(config)
    except ConfigurationError as error:
        return error.message
    listed = f"fanfold only lists prices of {', '.join(list_priced_hosts())}"
    if not specs:
        return f"{listed}; the endpoints have other hosts"
    found = list[ListedPrice]()
    for spec in specs:
        host = urlsplit(spec.url).hostname or ""
        if (provider := find_provider_name(host)) is None:
            return f"{listed}, not of {host}"
        ids = list(_ids(config, spec, model))
        entries = [entry for i in ids if (entry := find_listed_price(host, i)) is not None]
        if not entries:
            return f"fanfold's list for {provider} does not include it"
        found += entries
    return max(found, key=lambda entry: (entry.completion, entry.prompt))


def _list_named(config: RunConfig) -> list[EndpointSpec]:
    """Return the endpoints if the settings list them one by one."""
    # commands that only read need no fleet
    from ..discovery.resolve import list_endpoint_specs  # noqa: PLC0415
    from ..fleet.endpoint import NO_KEY  # noqa: PLC0415

    # Specs only, no requests: a key that is missing in the run folder does not matter here.
    endpoints = config.endpoints.model_copy(update={"api_key": SecretStr(NO_KEY)})
    try:
        return list_endpoint_specs(endpoints, {}) if endpoints.urls or endpoints.file else []
    except NoEndpointError:
        return []  # endpoints that start later run on nodes, which have no listed price


def _ids(config: RunConfig, spec: EndpointSpec, model: str) -> Iterator[str]:
    """Yield the model ids that an endpoint may bill."""
    if spec.model is not None:
        yield spec.model
        return
    yield model
    yield from (served for served, name in config.endpoints.models.items() if name == model)


def explain_no_price(config: RunConfig, model: str, simulated: bool) -> str:
    """Return why a model has no price; call only if it has none."""
    found = None if simulated else _from_list(config, model)
    return found if isinstance(found, str) else "simulated answers cost nothing"
