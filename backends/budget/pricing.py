"""Prices of a run's calls, and their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import SecretStr

from ...configs.prices import ListedPrice, find_listed_price, find_provider_name, list_priced_hosts
from ..core.errors import ConfigurationError, NoEndpointError
from ..core.money import TokenPrices
from ..core.types import Json

if TYPE_CHECKING:
    from ...configs.models import RunConfig
    from ..fleet.endpoint import EndpointSpec

PRICE_SETTING: Final = "model.price"
"""Source of a price from the settings."""

_STANDARD: Final = frozenset({None, "auto", "default"})
"""Service tiers at the listed prices."""


@dataclass(frozen=True, slots=True)
class Price:
    """Prices in US dollars, with their source.

    Attributes:
        prompt: Per million prompt tokens; None if tokens have no price.
        cached_prompt: Per million prompt tokens from a prefix cache; None: same as ``prompt``.
        completion: Per million completion tokens.
        node_hour: Per node and hour, or None.
        source: ``model.price``, or the web page of a listed price.
        provider: Provider of a listed price, or None.
        date: Date of the price list, or None.
        longest_prompt: Tokens above which a prompt costs more than listed, or None.
        simulated: Whether the price is for a simulated fleet.
    """

    prompt: float | None = None
    cached_prompt: float | None = None
    completion: float | None = None
    node_hour: float | None = None
    source: str = PRICE_SETTING
    provider: str | None = None
    date: str | None = None
    longest_prompt: int | None = None
    simulated: bool = False

    @property
    def token_prices(self) -> TokenPrices:
        """Return prices in whole small units; zero where no price is set."""
        return TokenPrices.from_usd(
            self.prompt or 0.0, self.cached_prompt, self.completion or 0.0, self.node_hour or 0.0
        )

    def __str__(self) -> str:
        """Return prices, source and date in words."""
        parts = [f"${self.prompt:g} prompt" if self.prompt is not None else ""]
        parts.append(f"${self.cached_prompt:g} cached" if self.cached_prompt is not None else "")
        parts.append(f"${self.completion:g} completion" if self.completion is not None else "")
        tokens = ", ".join(part for part in parts if part)
        priced = [f"{tokens} per million tokens"] if tokens else []
        priced += [f"${self.node_hour:g} per node-hour"] if self.node_hour is not None else []
        source = self.source
        if self.provider is not None:
            source = f"fanfold's list of {self.date} for {self.provider}, {self.source}"
        return f"{'; '.join(priced)} ({source})" + (", SIMULATED" if self.simulated else "")

    def to_json(self) -> dict[str, Json]:
        """Return plain data for the provenance."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """Read a price from plain data."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


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


def read_price(about: Mapping[str, Any]) -> Price | None:
    """Return the price in a run's provenance, or None."""
    kept = about.get("price")
    return Price.from_json(kept) if isinstance(kept, Mapping) else None
