"""The exception tree, and exit codes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Final


class FanfoldError(RuntimeError):
    """Root of all errors that fanfold raises on purpose.

    It is a ``RuntimeError`` because LangGraph's server hides the texts of most other classes from
    its clients.

    Args:
        message: What happened, where, and what to do about it.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self._folders: tuple[str, ...] = ()

    def hide_folders(self, folders: Collection[str]) -> None:
        """Hide folders in ``repr``, which LangGraph stores in its checkpoints.

        Args:
            folders: Paths as they appear in the message.
        """
        self._folders = (*sorted(folders, key=len, reverse=True), *self._folders)

    def __repr__(self) -> str:
        """Return class and message."""
        text = self.message
        for folder in self._folders:
            text = text.replace(folder, "the run folder")
        return f"{type(self).__name__}({text!r})"


class ConfigurationError(FanfoldError):
    """A setting is missing, wrong or contradicts another."""


class InputError(ConfigurationError):
    """The input cannot be read, or its rows do not fit the task."""


class MissingExtraError(ConfigurationError):
    """An optional dependency is not installed.

    Args:
        feature: The feature that needs it, e.g. ``"reading SMILES"``.
        extra: The extra of fanfold that installs it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the extra '{extra}': pip install 'fanfold[{extra}]'")
        self.feature = feature
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the two arguments, because the message is derived from them."""
        return type(self), (self.feature, self.extra)


class NoEndpointError(ConfigurationError):
    """No endpoint is listed or answers; waiting may help."""


class EndpointError(FanfoldError):
    """One call to one endpoint failed.

    Args:
        message: What happened and what to do.
        endpoint: The endpoint's label (never with credentials), or ``""``.
        status: HTTP status, or None if there was no answer.
        code: The server's own error code or type, or None.
        retry_after: Seconds that the server asked to wait, or None.
    """

    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        endpoint: str = "",
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.status = status
        self.code = code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the fields over a pickle round trip."""
        fields = (self.message, self.endpoint, self.status, self.code, self.retry_after)
        return type(self), fields


class EndpointBusyError(EndpointError):
    """The endpoint refused the request for now (429, 503)."""


class EndpointLostError(EndpointError):
    """Connection refused, reset or cut, or no answer in time.

    Attributes:
        has_partial_answer: Whether a part of a streamed answer had been read.
    """

    has_partial_answer: bool = False


class EndpointReplyError(EndpointError):
    """The answer is not a chat completion: malformed, HTML, or an error with status 200."""


class AuthenticationError(EndpointError):
    """The endpoint refused the key (401, 403)."""

    retryable: ClassVar[bool] = False


class RequestRefusedError(EndpointError):
    """The endpoint refused the request itself; the same request would be refused again."""

    retryable: ClassVar[bool] = False


class ModelNotServedError(RequestRefusedError):
    """The endpoint does not serve the model."""


class PromptTooLongError(RequestRefusedError):
    """The prompt exceeds the model's context, or the server's limit of a request."""


class AnswerError(FanfoldError):
    """The model answered, but not with what was asked.

    Args:
        message: What is wrong with the answer.
        raw: The answer's text.
    """

    def __init__(self, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.raw = raw

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the raw text over a pickle round trip."""
        return type(self), (self.message, self.raw)


class TruncatedAnswerError(AnswerError):
    """The answer was cut at ``max_tokens``, or at the end of the context.

    Attributes:
        is_context_full: Whether the prompt left too little of the context for the answer.
    """

    is_context_full: bool = False


class EmptyAnswerError(AnswerError):
    """The answer holds no text."""


class RefusedAnswerError(AnswerError):
    """The model or a content filter refused to answer."""


class InvalidAnswerError(AnswerError):
    """The answer does not parse as JSON, or breaks the schema."""


class InvalidItemError(FanfoldError):
    """The item cannot be sent to a model."""


class ItemLimitError(FanfoldError):
    """The item exceeded its limits; its unfinished work is cancelled."""


class ItemTimeoutError(ItemLimitError):
    """The item took longer than ``limits.item_timeout_s``."""


class TooManyStepsError(ItemLimitError):
    """The item's graph took more steps than ``limits.steps_per_item``."""


class ItemGraphError(FanfoldError):
    """``task.graph`` paused at ``interrupt()`` or sent a command to a parent graph."""


class RunStoppedError(FanfoldError):
    """The run cannot continue; finished items are saved, and the run can be resumed."""


class BudgetExhaustedError(RunStoppedError):
    """The remaining budget does not cover another call; a higher limit lets the run continue."""


class BackendError(FanfoldError):
    """The backend that runs a shard failed."""


class WorkerLostError(BackendError):
    """A worker died; its shard can run on another worker."""

    retryable: ClassVar[bool] = True


class JournalError(FanfoldError):
    """The journal cannot be written or read, or belongs to another run."""


RUN_ENDING_ERRORS: Final = (RunStoppedError, ConfigurationError, JournalError)
"""Errors in an item's work that are not caused by the item: they stop the run."""


EXIT_DONE: Final = 0
"""All items are done."""
EXIT_OTHER: Final = 1
"""Anything else."""
EXIT_USAGE: Final = 2
"""Wrong usage or settings."""
EXIT_FAILURES: Final = 3
"""Some items failed."""
EXIT_BUDGET: Final = 4
"""The budget is exhausted; resumable with a higher one."""
EXIT_INTERRUPTED: Final = 5
"""Interrupted, and resumable."""
