"""Files that requests name by a URL, and the forms in which they are sent to a server.

A request for a transcription names its audio, and the server takes an upload. The content comes
from a data URL, or from a host that the settings allow: requests must not decide which addresses
this process asks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from ..core.errors import EndpointError, InvalidItemError
from ..core.lazy_tls import aiohttp
from ..core.request_urls import RequestKind, find_file_problem
from .failures import BodyTooLargeError, classify_exception
from .transport import Transport

MOST_BYTES: Final = 25 * 2**20
"""Limit of a file that is fetched: that of vLLM's servers, and of OpenAI's."""
_FETCH_S: Final = 60.0
"""Longest wait for a file, in seconds."""
_TRIES: Final = 3
_WAIT: Final = wait_exponential(multiplier=0.5)
_REDIRECTS: Final = 5
_OK: Final = 200
_MOVED: Final = frozenset({301, 302, 303, 307, 308})
_TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
_SUFFIXES: Final[Mapping[str, str]] = {
    "audio/flac": "flac",
    "audio/m4a": "m4a",
    "audio/mp3": "mp3",
    "audio/mp4": "m4a",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/wav": "wav",
    "audio/wave": "wav",
    "audio/webm": "webm",
    "audio/x-flac": "flac",
    "audio/x-m4a": "m4a",
    "audio/x-wav": "wav",
    "video/mp4": "mp4",
    "video/webm": "webm",
}
"""Suffixes by media type: some servers tell the format by the name of the file."""


class _TransientError(EndpointError):
    """A file could not be fetched now."""


@dataclass(frozen=True, slots=True)
class UploadFile:
    """The content of a file, as a member of a request.

    Attributes:
        name: Its name, whose suffix tells its format if that is known.
        data: Its content.
    """

    name: str
    data: bytes = field(repr=False)


class FileLoader:
    """Loads the files that requests name.

    Args:
        transport: The connections.
        hosts: Hosts from which files may be fetched.
    """

    def __init__(self, transport: Transport, hosts: Collection[str]) -> None:
        self._transport, self._hosts = transport, hosts

    async def attach(self, body: Mapping[str, Any], kind: RequestKind) -> Mapping[str, Any]:
        """Return a request with the content of its file in place of the URL.

        Raises:
            InvalidItemError: The URL is malformed or not allowed, or there is no such file.
            EndpointError: The file's host did not answer in several attempts.
        """
        assert kind.file is not None, "requests of this kind name a file"
        url: Any = body.get(kind.file)
        if problem := find_file_problem(url, self._hosts):
            raise InvalidItemError(f"body.{kind.file}: {problem}")
        rest = {name: value for name, value in body.items() if name != kind.file}
        if url.startswith("data:"):
            return {**rest, "file": await asyncio.to_thread(_decode, url, kind.file)}
        return {**rest, "file": await self._fetch(url)}

    async def _fetch(self, url: str) -> UploadFile:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(_TRIES),
            wait=_WAIT,
            retry=retry_if_exception_type(_TransientError),
            reraise=True,
        )
        try:
            return await retrying(self._fetch_once, url)
        except _TransientError as error:  # the file may be there later
            msg = f"the file {describe_url(url)}: {error.message}"
            raise EndpointError(msg, error.endpoint) from None
        except EndpointError as error:
            raise InvalidItemError(f"the file {describe_url(url)}: {error.message}") from None

    async def _fetch_once(self, url: str) -> UploadFile:
        at = url
        for _ in range(_REDIRECTS + 1):
            host = urlsplit(at).hostname or ""
            try:
                answer = await self._transport.fetch(at, _FETCH_S, MOST_BYTES)
            except BodyTooLargeError:
                raise EndpointError(f"it is larger than {MOST_BYTES:,} bytes", host) from None
            except (aiohttp.ClientError, TimeoutError) as error:
                raise _TransientError(classify_exception(error, host).error.message, host) from None
            except ValueError:  # aiohttp parses the URL once more
                raise EndpointError("its URL is malformed", host) from None
            if answer.status not in _MOVED:
                break
            try:
                target = urljoin(at, answer.headers.get("location", ""))
            except ValueError:
                raise EndpointError(f"{host} redirects to a malformed URL", host) from None
            if target.startswith("data:"):
                raise EndpointError(f"{host} redirects to a data URL", host)
            if at.startswith("https:") and not target.startswith("https:"):
                raise EndpointError(f"{host} redirects from https to another scheme", host)
            if problem := find_file_problem(target, self._hosts):
                raise EndpointError(f"{host} redirects to another place: {problem}", host)
            at = target
        else:
            raise EndpointError(f"more than {_REDIRECTS} redirects", host)
        if answer.status != _OK:
            kind = _TransientError if answer.status in _TRANSIENT else EndpointError
            raise kind(f"{host} answered HTTP {answer.status}", host)
        media = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        _, _, suffix = urlsplit(at).path.rpartition(".")
        known = suffix.lower() if suffix.lower() in _SUFFIXES.values() else _SUFFIXES.get(media)
        return UploadFile(f"audio.{known or 'bin'}", answer.body)


def describe_url(url: str) -> str:
    """Return a URL for messages, without its query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def _decode(url: str, member: str) -> UploadFile:
    head, _, text = url.partition(",")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidItemError(f"body.{member}: the data URL is not base64") from None
    media = head.removeprefix("data:").partition(";")[0].strip().lower()
    return UploadFile(f"audio.{_SUFFIXES.get(media, 'bin')}", data)


def encode_form(body: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return a request as multipart/form-data, and its content type.

    Lists become members ``NAME[]`` and objects JSON, as the openai package and vLLM have them.
    """
    boundary = secrets.token_hex(16)
    parts = list[bytes]()
    for name, value in _list_members(body):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{_escape(name)}"'
        if isinstance(value, UploadFile):
            head += f'; filename="{value.name}"\r\nContent-Type: application/octet-stream'
            parts += (head.encode(), b"\r\n\r\n", value.data, b"\r\n")
        else:
            parts.append(f"{head}\r\n\r\n{_to_text(value)}\r\n".encode(errors="replace"))
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def _list_members(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, list):
            yield from ((name if name.endswith("[]") else f"{name}[]", one) for one in value)
        elif value is not None:
            yield name, value


def _escape(name: str) -> str:
    """Return the name of a member for a header, as HTML's forms write it."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
