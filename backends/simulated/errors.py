"""The error that a simulated node answers over HTTP, in vLLM's form."""

from __future__ import annotations

from typing import Any

import orjson

from ..core.errors import FanfoldError


class ApiError(FanfoldError):
    """A request that the simulated node refuses.

    Args:
        message: What is wrong, in vLLM's words where it has some.
        status: HTTP status.
        kind: The body's ``type``.
        param: The field at fault, or None.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the fields over a pickle round trip."""
        return type(self), (self.message, self.status, self.kind, self.param)

    @property
    def body(self) -> bytes:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return error_body(self.message, self.kind, self.status, self.param)


def error_body(message: str, kind: str, code: int, param: str | None = None) -> bytes:
    """Encode an error as vLLM 0.32 does.

    Args:
        message: The text.
        kind: The ``type``.
        code: The HTTP status, repeated as an integer.
        param: The field at fault, or None.

    Returns:
        The JSON body.
    """
    error = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": error})
