"""Settings given by options of a command; needs no models of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loader import LoadedConfig


@dataclass(frozen=True, slots=True)
class Overrides:
    """Settings given by command-line options; each field is named as its option."""

    assignments: list[str]
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
    extends: Path | None = None
    ask_again: str | None = None
    only: str | None = None

    @property
    def budget_assignments(self) -> list[str]:
        """Return the caps as assignments to settings."""
        return [f"budget.{key}={cap}" for key, cap in self.budget.items() if cap is not None]

    @property
    def changes_settings(self) -> bool:
        """Return True if any of them changes the configuration."""
        given = (self.assignments, self.input_path, self.limit, self.endpoints, self.metrics_port)
        return any(given) or bool(self.budget_assignments)

    @property
    def starts_session(self) -> bool:
        """Return True if they ask for a session even of a run that is finished."""
        return self.changes_settings or self.retry_failed or self.trace or bool(self.checkpointer)

    def resolve(self, config: str) -> tuple[LoadedConfig, list[str]]:
        """Return the configuration with the options applied, and notices."""
        from .resolve import check_metrics, resolve_config  # noqa: PLC0415 - pydantic takes 0.1 s

        overrides = [*self.assignments, *self.budget_assignments]
        if self.metrics_port is not None:
            overrides.append(f"metrics.port={self.metrics_port}")
        loaded, notices = resolve_config(
            config, overrides, self.input_path, self.limit, self.endpoints
        )
        if loaded.config.metrics.port is not None:
            check_metrics()
        return loaded, notices
