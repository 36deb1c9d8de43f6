"""Clients of the stand-in for `backend.client`, in any process."""

from __future__ import annotations

import os

import globus_sdk
from globus_compute_sdk import Client

from .client import URL_VARIABLE

LOGIN = f"{__name__}:login"


def login() -> Client:
    """Return a client of the service that the environment names; it opens no connection."""
    authorizer = globus_sdk.AccessTokenAuthorizer("stand-in")
    client = Client(authorizer=authorizer, do_version_check=False)
    client.web_service_address = os.environ[URL_VARIABLE]
    return client
