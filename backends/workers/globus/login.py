"""A client of the SDK, logged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...core.errors import ConfigurationError
from .errors import LOGIN
from .service import ComputeService, refusals


def connect(
    make: Callable[[], Any] | None,
    user_endpoint_config: dict[str, Any] | None = None,
    ask: bool = False,
    hidden: Sequence[str] = (),
) -> ComputeService:
    """Return the service; blocks.

    Args:
        make: Makes the SDK's client; None takes the SDK's usual one.
        user_endpoint_config: Values for the endpoint's template, or None.
        ask: Whether somebody at a terminal may be asked to log in.
        hidden: Texts among these values that no message may show.

    Raises:
        ConfigurationError: There is no login.
        FanfoldError: The service refused, or did not answer.
    """
    client = make() if make is not None else _usual_client()
    if not ask:
        _require_login(client)
    with refusals("connecting"):
        if make is None:
            _check_version(client)
        return ComputeService(client, user_endpoint_config, hidden)


def _usual_client() -> Any:
    from globus_compute_sdk import Client  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return Client(do_version_check=False)
    except ValueError as error:  # half a pair of credentials in the environment
        raise ConfigurationError(f"globus_compute: {error}") from error


def _require_login(client: Any) -> None:
    """Refuse where the SDK would ask at the terminal, in the middle of a run."""
    from globus_sdk import UserApp  # noqa: PLC0415 - slow to import, rarely needed

    if isinstance(client.app, UserApp) and client.app.login_required():
        raise ConfigurationError(f"globus_compute: there is no login on this machine: {LOGIN}")


def _check_version(client: Any) -> None:
    from globus_compute_sdk.errors import VersionMismatch  # noqa: PLC0415 - slow to import

    try:
        client.version_check()
    except VersionMismatch as error:
        msg = f"globus_compute: {error}; install a newer globus-compute-sdk"
        raise ConfigurationError(msg) from error
