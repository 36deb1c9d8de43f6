"""What every call of a run has in common: model, sampling and the answer's schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.types import Json


@dataclass(frozen=True, slots=True)
class ModelParams:
    """The constant part of a chat request.

    Attributes:
        name: The model's id, as the endpoints list it in ``/v1/models``.
        temperature: Sampling temperature, or None for the server's default.
        max_tokens: Most tokens of one answer, or None for all the remaining context (a
            server then may write until its context is full: always set one in bulk runs).
        seed: Sampling seed, or None.
        extra_body: Further top-level fields of the request, e.g. vLLM's ``top_k``.
        schema: JSON Schema that constrains the answer, or None for free text.
        schema_name: Name sent along with the schema.
        strict: Whether to ask the server for strict adherence to the schema.
    """

    name: str
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    extra_body: Mapping[str, Json] = field(default_factory=dict)
    schema: Mapping[str, Json] | None = None
    schema_name: str = "answer"
    strict: bool = True

    def response_format(self) -> dict[str, Json] | None:
        """Return the ``response_format`` field that asks for the schema, or None."""
        if self.schema is None:
            return None
        wanted = {"name": self.schema_name, "schema": dict(self.schema), "strict": self.strict}
        return {"type": "json_schema", "json_schema": wanted}

    def body(self) -> dict[str, Json]:
        """Return the request's fields except ``messages``.

        ``max_tokens`` travels as ``max_completion_tokens``, as ChatOpenAI sends it, and
        ``extra_body`` wins over the named fields, as in the openai package.
        """
        fields: dict[str, Json] = {
            "model": self.name,
            "temperature": self.temperature,
            "max_completion_tokens": self.max_tokens,
            "seed": self.seed,
            "response_format": self.response_format(),
        }
        return {k: v for k, v in fields.items() if v is not None} | dict(self.extra_body)
