"""What the options of the command line change of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .loader import Loaded
from .resolve import check_metrics, settle


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options ask for; each field is as in the command line."""

    overrides: list[str]
    input_path: str | None = None
    limit: int | None = None
    endpoints: str | None = None
    checkpointer: str | None = None
    trace: bool = False
    retry_failed: bool = False
    metrics_port: int | None = None
    budget: Mapping[str, float | None] = field(default_factory=dict)
    pilot: int | None = None
    yes: bool = False

    @property
    def caps(self) -> list[str]:
        """Return the caps as overrides of settings."""
        return [f"budget.{key}={cap}" for key, cap in self.budget.items() if cap is not None]

    @property
    def changes_settings(self) -> bool:
        """Say whether any of them changes the configuration."""
        given = (self.overrides, self.input_path, self.limit, self.endpoints, self.metrics_port)
        return any(given) or bool(self.caps)

    def settled(self, config: str) -> tuple[Loaded, list[str]]:
        """Return the configuration with the options applied, and notices."""
        overrides = [*self.overrides, *self.caps]
        if self.metrics_port is not None:
            overrides.append(f"metrics.port={self.metrics_port}")
        loaded, notices = settle(config, overrides, self.input_path, self.limit, self.endpoints)
        if loaded.config.metrics.port is not None:
            check_metrics()
        return loaded, notices
