"""The price of a run's calls as its provenance keeps it; needs no settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from ..core.money import TokenPrices
from ..core.types import Json

PRICE_SETTING: Final = "model.price"
"""Source of a price from the settings."""


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


def read_price(about: Mapping[str, Any]) -> Price | None:
    """Return the price in a run's provenance, or None."""
    kept = about.get("price")
    return Price.from_json(kept) if isinstance(kept, Mapping) else None
