"""Section ``budget``: limits on what a run may spend."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .base import Access, Section, declare_access

WarnShare = Annotated[float, Field(gt=0, lt=1)]


class ReserveConfig(Section):
    """An amount that a budget keeps for later.

    Attributes:
        usd: US dollars.
        tokens: Prompt and completion tokens.
        requests: Requests.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="usd tokens requests")

    usd: Annotated[float, Field(ge=0, le=9_000_000)] = 0
    tokens: Annotated[int, Field(ge=0, le=2**53)] = 0
    requests: Annotated[int, Field(ge=0, le=2**53)] = 0


class BudgetConfig(Section):
    """Limits on the spending of a run over all of its sessions; None means no limit.

    Attributes:
        usd: US dollars.
        tokens: Prompt and completion tokens.
        requests: Requests sent, including failed ones.
        node_hours: Hours times nodes.
        on_limit: ``pause`` waits for a higher limit by LangGraph's interrupt; ``stop`` ends the run
            with an error. In both cases it can be resumed.
        warn_at: Fractions of a limit at which a warning is logged.
        reserve_for_reduce: What stages leave of the limits for later stages that reduce: ``auto``,
            the estimate for them; or amounts (usd, tokens, requests), 0 by default.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        lower="usd tokens requests node_hours",
        closed="on_limit warn_at reserve_for_reduce",
    )

    usd: Annotated[float, Field(gt=0, le=9_000_000)] | None = None
    tokens: Annotated[int, Field(gt=0, le=2**53)] | None = None
    requests: Annotated[int, Field(gt=0, le=2**53)] | None = None
    node_hours: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = None
    on_limit: Literal["pause", "stop"] = "pause"
    warn_at: list[WarnShare] = Field(default_factory=lambda: [0.5, 0.9])
    reserve_for_reduce: ReserveConfig | Literal["auto"] = "auto"

    @property
    def limits(self) -> dict[str, float | None]:
        """Return the limits by the names of their settings."""
        return {key: getattr(self, key) for key in ("usd", "tokens", "requests", "node_hours")}

    @property
    def counts_tokens(self) -> bool:
        """Return True if a limit depends on the tokens of requests."""
        return self.usd is not None or self.tokens is not None
