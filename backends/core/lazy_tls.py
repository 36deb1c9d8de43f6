"""aiohttp, imported without reading the certificate authorities of the system.

At import aiohttp makes two TLS contexts, each of which reads them: 30 ms of CPU time where they are
one file, as on most clusters and in conda. Here the contexts read them at the first TLS connection.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Final

__all__ = ["aiohttp"]

_READ: Final = "set_default_verify_paths"


class _LazyContext(ssl.SSLContext):
    """A TLS context that reads the certificate authorities when a connection needs them."""

    _has_authorities = False

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        self._read_authorities()
        return super().wrap_bio(*args, **options)

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        self._read_authorities()
        return super().wrap_socket(*args, **options)

    def _read_authorities(self) -> None:
        if not self._has_authorities:
            self.load_default_certs()
            self._has_authorities = True


@contextmanager
def _make_contexts_lazy() -> Iterator[None]:
    """Turn TLS contexts that this thread makes into lazy ones; others stay as they are.

    Does nothing if aiohttp has been imported, or if another package has replaced the contexts of
    Python (as truststore does).
    """
    replaced = ssl.SSLContext.__module__ != "ssl" or _READ in vars(ssl.SSLContext)
    if replaced or "aiohttp" in sys.modules:
        yield
        return
    read, thread = ssl.SSLContext.set_default_verify_paths, get_ident()

    def delay(context: Any) -> None:
        if get_ident() == thread and type(context) is ssl.SSLContext:
            context.__class__ = _LazyContext
        else:
            read(context)

    setattr(ssl.SSLContext, _READ, delay)
    try:
        yield
    finally:
        delattr(ssl.SSLContext, _READ)


with _make_contexts_lazy():
    import aiohttp
