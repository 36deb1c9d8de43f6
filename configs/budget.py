"""What a run may cost, and what things cost."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .base import Access, Section, declare

Share = Annotated[float, Field(gt=0, lt=1)]


class PriceConfig(Section):
    """Prices in US dollars.

    Attributes:
        prompt: Per million prompt tokens.
        cached_prompt: Per million prompt tokens that a prefix cache held; None: as the others.
        completion: Per million completion tokens.
        node_hour: Per node and hour, for nodes that you pay by time.
    """

    access: ClassVar[dict[str, Access]] = declare(
        closed="prompt cached_prompt completion node_hour",
    )

    prompt: Annotated[float, Field(ge=0)] | None = None
    cached_prompt: Annotated[float, Field(ge=0)] | None = None
    completion: Annotated[float, Field(ge=0)] | None = None
    node_hour: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> PriceConfig:
        if (self.prompt is None) != (self.completion is None):
            msg = "give the prices of both prompt and completion, in dollars per million tokens"
            raise ValueError(msg)
        if self.prompt is None and self.node_hour is None:
            msg = "give prompt and completion, or node_hour"
            raise ValueError(msg)
        if self.cached_prompt is not None and self.prompt is None:
            msg = "cached_prompt needs prompt and completion beside it"
            raise ValueError(msg)
        return self


class BudgetConfig(Section):
    """What all lives of a run may spend together; None is no limit.

    Attributes:
        usd: US dollars.
        tokens: Prompt and completion tokens.
        requests: Requests sent, failed ones included.
        node_hours: Hours times nodes held.
        on_limit: ``pause`` waits for a higher cap at LangGraph's interrupt; ``stop`` ends the run
            with an error. Either way it can be resumed.
        warn_at: Shares of a cap at which a warning is logged.
    """

    access: ClassVar[dict[str, Access]] = declare(
        lower="usd tokens requests node_hours",
        closed="on_limit warn_at",
    )

    usd: Annotated[float, Field(gt=0, le=9_000_000)] | None = None
    tokens: Annotated[int, Field(gt=0, le=2**53)] | None = None
    requests: Annotated[int, Field(gt=0, le=2**53)] | None = None
    node_hours: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = None
    on_limit: Literal["pause", "stop"] = "pause"
    warn_at: list[Share] = Field(default_factory=lambda: [0.5, 0.9])
