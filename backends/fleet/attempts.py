"""The failed calls of one item: which endpoints it has tried, and whether it may go on."""

from __future__ import annotations

from .endpoint import Endpoint
from .failures import Failure, Step
from .policy import RetryPolicy


class Attempts:
    """Made at an item's first failure, so that a call that succeeds at once pays nothing.

    Args:
        policy: How often and how patiently to repeat.

    Attributes:
        avoid: Endpoints that failed this item, or cannot hold it.
    """

    __slots__ = (
        "_counted",
        "_failures",
        "_limited",
        "_policy",
        "_server_errors",
        "_until",
        "avoid",
    )

    def __init__(self, policy: RetryPolicy, now: float) -> None:
        self._policy = policy
        self._failures = 0
        self._counted = 0
        self._until = now + policy.patience_s
        self._limited = 0
        self._server_errors: dict[tuple[int | None, str | None], set[Endpoint]] = {}
        self.avoid: set[Endpoint] = set()

    def after(self, endpoint: Endpoint, failure: Failure, now: float, chance: float) -> float:
        """Count a failure and return the seconds to wait before the next call.

        Args:
            endpoint: Who failed.
            failure: How.
            now: Monotonic time in seconds.
            chance: A random number in 0 to 1, to spread callers.

        Raises:
            EndpointError: It was the last attempt, or asking again is hopeless.
        """
        treatment = failure.treatment
        # A connection that idled a moment too long is no sign of anything: free, once.
        stale = treatment.stale and self._failures == 0
        self._failures += 1
        self._counted += not (treatment.free or stale)
        self._limited += treatment.tries is not None
        if (
            treatment.step is Step.FAIL
            or self._counted >= self._policy.attempts
            or (treatment.tries is not None and self._limited >= treatment.tries)
            or (treatment.poison and self._is_poison(endpoint, failure))
            or now >= self._until
        ):
            raise failure.error
        if stale or treatment.step is Step.WAIT:
            # An endpoint that refuses is paused for all callers, not for this one alone.
            return 0.0
        if treatment.step is Step.SAME:
            # What is free is another request than the one that was refused.
            return 0.0 if treatment.free else self._policy.pause(self._failures, chance)
        repeated = endpoint in self.avoid
        self.avoid.add(endpoint)
        return self._policy.pause(self._failures, chance) if repeated else 0.0

    def _is_poison(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Tell whether the item is at fault: others are answered where it meets this error."""
        error = failure.error
        met = self._server_errors.setdefault((error.status, error.code), set())
        if endpoint.serves_others:
            met.add(endpoint)
        return len(met) >= self._policy.poison_endpoints
