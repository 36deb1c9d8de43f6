"""Tokens as Globus Auth issues them to an application, for the only user of the stand-in."""

from __future__ import annotations

import base64
import json
import time
from functools import cached_property
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from globus_sdk.scopes import ComputeScopes

from .records import Json

USER = {"sub": "11111111-2222-4333-8444-555555555555", "username": "user@localhost"}
LASTS_S = 172_800


class Identity:
    """Issues tokens that nobody checks, but for the identity's, which the SDK does."""

    @cached_property
    def _key(self) -> rsa.RSAPrivateKey:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def keys(self) -> Json:
        """Return the public key with which the identity's token is checked."""
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key())
        return {"keys": [json.loads(public) | {"alg": "RS512", "use": "sig", "kid": "k"}]}

    def user(self) -> Json:
        """Return the identity of any caller."""
        return USER_INFO

    def tokens(self, scopes: str, authorization: str) -> Json:
        """Answer a request for tokens.

        Args:
            scopes: What is asked for, separated by spaces.
            authorization: The header, with the client's id and secret.
        """
        wanted = scopes.split()
        own = {"openid", *(s for s in wanted if "manage_projects" in s or "view_identity" in s)}
        by_server = {
            str(ComputeScopes.resource_server): [s for s in wanted if s not in own],
            "auth.globus.org": [s for s in wanted if s in own],
        }
        first, *others = [_token(server, names) for server, names in by_server.items() if names]
        if "openid" in wanted:
            first["id_token"] = self._who(authorization)
        return first | {"other_tokens": others}

    def _who(self, authorization: str) -> str:
        client = base64.b64decode(authorization.rsplit(maxsplit=1)[-1]).decode().partition(":")[0]
        now = int(time.time())
        claims: dict[str, Any] = {"sub": USER["sub"], "aud": client, "iss": "stand-in"}
        return jwt.encode(claims | {"iat": now, "exp": now + LASTS_S}, self._key, "RS512")


USER_INFO: Json = {
    "sub": USER["sub"],
    "preferred_username": USER["username"],
    "identity_set": [USER],
}


def _token(server: str, scopes: list[str]) -> Json:
    return {
        "access_token": f"stand-in-{server}",
        "scope": " ".join(scopes),
        "expires_in": LASTS_S,
        "token_type": "Bearer",
        "resource_server": server,
    }
