"""Items that begin alike go to the same endpoint: its prefix cache knows the beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from .endpoint import Endpoint
from .policy import AffinityPolicy


class Affinity:
    """Remembers who met which beginning first; the least recently used is forgotten.

    Args:
        policy: How long a beginning is, and how many are remembered.
    """

    def __init__(self, policy: AffinityPolicy) -> None:
        self._policy = policy
        self._homes: OrderedDict[int, Endpoint] = OrderedDict()

    def key(self, body: Mapping[str, Any]) -> int:
        """Return what stands for a request's beginning; equal ones are equal in this process."""
        parts: list[str] = []
        room = self._policy.prefix
        for message in body["messages"]:
            text = f"{message.get('role')}:{message.get('content')}"
            parts.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        return hash(tuple(parts))

    def home(self, key: int) -> Endpoint | None:
        """Return who met a beginning first and is still there, or None."""
        endpoint = self._homes.get(key)
        if endpoint is None or not endpoint.alive:
            return None
        self._homes.move_to_end(key)
        return endpoint

    def met(self, key: int, endpoint: Endpoint) -> None:
        """Note who was asked; a home that is only loaded stays home."""
        home = self._homes.get(key)
        if home is None or not home.alive:
            self._homes[key] = endpoint
            if len(self._homes) > self._policy.keys:
                self._homes.popitem(last=False)
