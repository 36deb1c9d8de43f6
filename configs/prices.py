"""The list of known prices that ships with fanfold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

import orjson

_SNAPSHOT: Final = re.compile(r"-\d{4}-\d{2}-\d{2}$", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Entry:
    prompt: float
    completion: float
    cached_prompt: float | None = None
    cache_write: float | None = None
    longest_prompt: int | None = None


@dataclass(frozen=True, slots=True)
class _Provider:
    name: str
    hosts: list[str]
    source: str
    date: str
    models: dict[str, _Entry]
    snapshots: bool = False


@dataclass(frozen=True, slots=True)
class ListedPrice:
    """A provider's price of a model, in US dollars per million tokens.

    Attributes:
        provider: The provider's name.
        model: The model, as the list names it.
        prompt: Price of the prompt; the price of writing to the cache if that is higher.
        cached_prompt: Price of prompt tokens from a prefix cache; None: the price of prompt.
        completion: Price of the answer.
        longest_prompt: Tokens of the longest prompt at this price; None: any.
        date: Date of the list, as ``YYYY-MM-DD``.
        source: The provider's page.
    """

    provider: str
    model: str
    prompt: float
    cached_prompt: float | None
    completion: float
    longest_prompt: int | None
    date: str
    source: str


def find_provider_name(host: str) -> str | None:
    """Return the name of the provider of a host, or None for an unknown host."""
    found = _find_provider(host)
    return None if found is None else found.name


def find_listed_price(host: str, model: str) -> ListedPrice | None:
    """Return the listed price of a model at the provider of a host, or None.

    A model's name alone is not enough: ``openai/gpt-oss-120b`` on your own nodes is paid to no
    provider.

    Args:
        host: Name of the host.
        model: The requested id; it may end with the date of a snapshot.
    """
    provider = _find_provider(host)
    if provider is None:
        return None
    name = model
    if name not in provider.models and provider.snapshots:
        name = _SNAPSHOT.sub("", model)
    entry = provider.models.get(name)
    if entry is None:
        return None
    return ListedPrice(
        provider=provider.name,
        model=name,
        prompt=max(entry.prompt, entry.cache_write or 0.0),
        cached_prompt=entry.cached_prompt,
        completion=entry.completion,
        longest_prompt=entry.longest_prompt,
        date=provider.date,
        source=provider.source,
    )


def list_priced_hosts() -> tuple[str, ...]:
    """Return all hosts whose prices are listed."""
    return tuple(host for provider in _read_prices() for host in provider.hosts)


def _find_provider(host: str) -> _Provider | None:
    wanted = host.casefold().removesuffix(".")
    return next((p for p in _read_prices() if wanted in p.hosts), None)


@cache
def _read_prices() -> tuple[_Provider, ...]:
    # JSON and plain classes: with YAML and pydantic it takes ten times as long
    data = orjson.loads((files("fanfold.configs") / "data" / "prices.json").read_bytes())
    return tuple(
        _Provider(**one | {"models": {name: _Entry(**e) for name, e in one["models"].items()}})
        for one in data["providers"]
    )
