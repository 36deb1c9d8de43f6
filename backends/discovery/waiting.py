"""Waiting until enough endpoints are ready, and saying so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

from ...configs.endpoints import EndpointsConfig
from ..core.errors import NoEndpointError, RunStoppedError

_SAY_S: Final = 60.0


class _Counted(Protocol):
    """Endpoints that were asked."""

    @property
    def ready(self) -> int:
        """Return how many answer and serve the model."""
        ...


T = TypeVar("T", bound=_Counted)


def _unknown() -> None:
    return None


async def enough(
    ask: Callable[[], Awaitable[T]],
    endpoints: EndpointsConfig,
    say: Callable[[str], None],
    most: Callable[[], int | None] = _unknown,
) -> T:
    """Ask again and again until as many endpoints are ready as the settings want.

    Args:
        ask: Asks all endpoints that are there.
        endpoints: How many are wanted, and how long that is waited for.
        say: Tells the user what is waited for: when it changes, and once a minute.
        most: Tells how many can still be ready in the end, or None where nobody knows; may block.

    Raises:
        RunStoppedError: They have not come in time, or cannot come any more.
        ConfigurationError: They serve another model, or waiting does not help for another reason.
    """
    begun, told, said = time.monotonic(), "", float("-inf")
    while True:
        found: T | None = None
        try:
            found = await ask()
            state = f"{found.ready} of {endpoints.least} ready"
        except NoEndpointError as error:
            state = f"0 of {endpoints.least} ready ({error.message})"
        if found is not None and found.ready >= endpoints.least:
            return found
        can = await asyncio.to_thread(most)
        if can is not None and can < endpoints.least:
            msg = (
                f"endpoints: {state}, and no more than {can} can be, for servers were given up "
                f"({endpoints.file}/logs/*.failed); nothing was asked, and the same command goes "
                "on when they are there"
            )
            raise RunStoppedError(msg)
        waited = time.monotonic() - begun
        if waited >= endpoints.wait_s:
            msg = (
                f"endpoints: {state} after {waited:.0f} s (endpoints.least, endpoints.wait_s); "
                "nothing was asked, and the same command goes on when they are there"
            )
            raise RunStoppedError(msg)
        if state != told or waited - said >= _SAY_S:
            say(f"endpoints: {state}; waiting, {endpoints.wait_s - waited:.0f} s more at most")
            told, said = state, waited
        await asyncio.sleep(min(endpoints.refresh_s, endpoints.wait_s - waited))
