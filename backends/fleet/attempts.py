"""The failed calls of one item: which endpoints it has tried, and whether it may go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any, Final

from . import room
from .endpoint import Endpoint, Mark
from .failures import Failure, Step
from .policy import RetryPolicy

_OTHERS: Final = 8
"""So many requests of others must be accepted in between: one of few is refused by chance."""
_PUT_OFF: Final = 2
"""After so many refusals for now elsewhere, the endpoints that failed the item are asked again."""
_REFUSED_ALONE: Final = 2
"""So many refusals for now of a call alone, after the first, show that its item is at fault."""


class Attempts:
    """Made at an item's first failure, so that a call that succeeds at once pays nothing.

    Args:
        policy: How often and how patiently to repeat.

    Attributes:
        avoid: Endpoints that failed this item, or cannot hold it.
        unfit: Those of them that cannot hold it.
        refusers: Endpoints that refused it for a reason that may lie in the item, and how.
        marks: Endpoints that refused it for now, and what each had done then.
        trusted: Endpoints that had lately answered another item when they refused this one.
        full: Endpoints that had no room for it again and again: no answer of theirs is waited for.
    """

    __slots__ = (
        "_alone",
        "_corrections",
        "_counted",
        "_failed",
        "_failures",
        "_limited",
        "_most",
        "_policy",
        "_put_off",
        "_refusals",
        "_server_errors",
        "_until",
        "_waits",
        "avoid",
        "full",
        "marks",
        "refusers",
        "trusted",
        "unfit",
    )

    def __init__(self, policy: RetryPolicy, now: float) -> None:
        self._policy = policy
        self._failures = 0
        self._counted = 0
        self._until = now + policy.patience_s
        self._limited = 0
        self._corrections = 0
        self._alone = 0
        self._waits = 0
        self._put_off: Counter[Endpoint] = Counter()
        self._refusals = 0
        self._most: dict[Endpoint, int] = {}
        self._server_errors: dict[tuple[int | None, str | None], set[Endpoint]] = {}
        self._failed: set[Endpoint] = set()
        self.avoid: set[Endpoint] = set()
        self.unfit: set[Endpoint] = set()
        self.refusers: dict[Endpoint, Failure] = {}
        self.trusted: set[Endpoint] = set()
        self.full: set[Endpoint] = set()
        self.marks: dict[Endpoint, Mark] = {}

    def exclude(self, unfit: Set[Endpoint]) -> None:
        """Ask no more of endpoints that cannot hold the request."""
        self.avoid |= unfit
        self.unfit |= unfit

    def fitted(self, endpoint: Endpoint, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the request as an endpoint takes it, by what it said when it refused it."""
        most = self._most.get(endpoint)
        return body if most is None else room.lowered(body, most)

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
        # An endpoint that answers others refuses the item: another one is asked to confirm it.
        confirming = failure.is_clear and failure.accepts_others
        alone = treatment.step is Step.WAIT and failure.accepts_others
        self._counted += not (treatment.free or stale or confirming or alone)
        self._refusals += confirming
        self._limited += treatment.tries is not None
        if treatment.step is Step.WAIT:
            self._count_alone(endpoint, failure, now)
        if failure.most_tokens is not None:
            self._corrections += 1
            self._most[endpoint] = failure.most_tokens
        if (
            treatment.step is Step.FAIL
            or max(self._corrections, self._refusals) > self._policy.free_retries
            or self._counted >= self._policy.attempts
            or (treatment.tries is not None and self._limited >= treatment.tries)
            or (treatment.poison and self._is_poison(endpoint, failure))
            or self.refused_alone
            or now >= self._until
        ):
            raise failure.error
        if stale:
            return 0.0
        if treatment.step is Step.WAIT:
            if len(self.avoid) > len(self.unfit):
                self._put_off[endpoint] += 1
            if self._put_off.total() >= _PUT_OFF:
                # Nobody else has room for it: it ends where it failed, or is answered after all.
                self.full |= self._put_off.keys()
                self._put_off.clear()
                self.avoid = set(self.unfit)
            return self._wait(endpoint, failure, chance)
        if treatment.step is Step.SAME:
            # What is free is another request than the one that was refused.
            return 0.0 if treatment.free else self._policy.pause(self._failures, chance)
        repeated = endpoint in self._failed
        self._failed.add(endpoint)
        self.avoid.add(endpoint)
        return self._policy.pause(self._failures, chance) if repeated else 0.0

    @property
    def refused_alone(self) -> bool:
        """Whether endpoints refuse it for now again and again, and answer others in between."""
        return self._alone >= _REFUSED_ALONE

    def _count_alone(self, endpoint: Endpoint, failure: Failure, now: float) -> None:
        """Count a refusal for now that no other item has met since the last one.

        Where others are refused too, the endpoint may have a limit that they share.
        """
        mark = self.marks.get(endpoint)
        clean = mark is not None and mark.throttled == endpoint.throttled
        if clean and mark is not None and failure.accepts_others:
            if endpoint.accepted - mark.accepted < _OTHERS:
                return  # those that are accepted from now on count as well
            self._alone += 1
        self.marks[endpoint] = endpoint.mark(now)

    def _wait(self, endpoint: Endpoint, failure: Failure, chance: float) -> float:
        """Return the pause after a refusal for now.

        An endpoint that refuses is paused for all callers. One that goes on with the requests of
        others, and refuses this one again and again, is asked less and less often.
        """
        if failure.accepts_others:
            seconds = failure.error.retry_after or self._policy.backoff_s
            return self._policy.spread(min(seconds, self._policy.backoff_max_s), chance)
        if endpoint.resting or not endpoint.alive:
            return 0.0
        self._waits += 1
        beyond = self._waits - self._policy.free_retries
        return self._policy.pause(beyond, chance) if beyond > 0 else 0.0

    def _is_poison(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Tell whether the item is at fault: others are answered where it meets this error."""
        error = failure.error
        met = self._server_errors.setdefault((error.status, error.code), set())
        if endpoint.serves_others:
            met.add(endpoint)
        return len(met) >= self._policy.poison_endpoints
