"""Pauses of retry policies: a random extension, and their use outside a retry loop."""

from __future__ import annotations

import random
from typing import Final

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_base

NO_LOOP: Final = Retrying()
"""The retry object of a state that tenacity's own loop does not use."""


class ExtendedWait(wait_base):
    """A pause that is extended by a random fraction, so that callers spread.

    Args:
        wait: The shortest pause.
        jitter: The largest fraction by which it is extended.
    """

    def __init__(self, wait: wait_base, jitter: float) -> None:
        self._wait, self._jitter = wait, jitter

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the seconds to wait before the next attempt."""
        return self._wait(retry_state) * (1.0 + self._jitter * random.random())


def pause_after(wait: wait_base, failures: int) -> float:
    """Return the pause after so many failures, for callers that set a timer."""
    state = RetryCallState(NO_LOOP, None, (), {})
    state.attempt_number = failures
    return wait(state)
