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
        avoid: Endpoints that failed this item.
    """

    __slots__ = ("_counted", "_failures", "_policy", "_server_errors", "_until", "avoid")

    def __init__(self, policy: RetryPolicy, now: float) -> None:
        self._policy = policy
        self._failures = 0
        self._counted = 0
        self._until = now + policy.patience_s
        self._server_errors: set[Endpoint] = set()
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
        if treatment.poison:
            self._server_errors.add(endpoint)
        if (
            treatment.step is Step.FAIL
            or self._counted >= self._policy.attempts
            or len(self._server_errors) >= self._policy.poison_endpoints
            or now >= self._until
        ):
            raise failure.error
        if stale or treatment.step is Step.WAIT:
            # An endpoint that refuses is paused for all callers, not for this one alone.
            return 0.0
        if treatment.step is Step.SAME:
            return self._policy.pause(self._failures, chance)
        repeated = endpoint in self.avoid
        self.avoid.add(endpoint)
        return self._policy.pause(self._failures, chance) if repeated else 0.0
