"""Images in chat messages: their kind, their size, their tokens, and text in their place."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .types import Json, Message, Row

IMAGE_PART: Final = "image_url"
"""Type of the part of a message that is an image."""

_PATCH: Final = 28
"""Pixels of the side of the square that is one token: Qwen2-VL and Qwen2.5-VL count so."""
_LEAST_TOKENS: Final = 256
_MOST_TOKENS: Final = 16_384
_UNKNOWN_TOKENS: Final = 2_048
"""Tokens of an image whose size is unknown, such as one that is given as a URL."""

HEAD_BYTES: Final = 1 << 17
"""Bytes from the start of a file in which the size of an image is found."""

_DATA: Final = re.compile(r"data:(image/[a-z.+-]+);base64,", re.ASCII)


@dataclass(frozen=True, slots=True)
class ItemImage:
    """An image of an item.

    Attributes:
        column: Column that names it.
        name: Its name: that of the file, or the URL.
        url: Data URL of its content, or the URL.
        sha256: Digest of its content, or of the URL; hexadecimal.
        size: Bytes of the file; None for a URL.
    """

    column: str
    name: str
    url: str
    sha256: str
    size: int | None = None

    def to_part(self) -> dict[str, Json]:
        """Return the image as a part of a message in OpenAI's form."""
        return {"type": IMAGE_PART, IMAGE_PART: {"url": self.url}}

    def describe(self) -> dict[str, Json]:
        """Return what a record says of the image: nothing of its content."""
        return {
            "column": self.column,
            "name": self.name,
            "bytes": self.size,
            "sha256": self.sha256,
        }

    def to_json(self) -> dict[str, Json]:
        """Return the whole image as plain data, for a message to a worker."""
        return {**self.describe(), "url": self.url}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ItemImage:
        """Return an image from :meth:`to_json`."""
        return cls(data["column"], data["name"], data["url"], data["sha256"], data["bytes"])


def describe_image(about: Mapping[str, Any]) -> str:
    """Return the text that stands for an image where messages are shown.

    Args:
        about: Result of :meth:`ItemImage.describe`.
    """
    size = about.get("bytes")
    told = "URL" if size is None else f"{size:,} bytes"
    return f"[image {about.get('name')}, {told}, sha256 {str(about.get('sha256'))[:16]}]"


def find_media_type(data: bytes) -> str | None:
    """Return the media type of an image by its first bytes: PNG, JPEG, GIF or WebP, else None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


_OTHERS: Final = (
    (b"%PDF", "a PDF"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"BM", "a BMP image"),
    (b"\0\0\x01\0", "an icon"),
    (b"PK", "a zip archive"),
)


def name_other_type(data: bytes) -> str:
    """Return what a file looks like that is no image of a known type, in words."""
    if not data:
        return "an empty file"
    for start, name in _OTHERS:
        if data.startswith(start):
            return name
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        return "a HEIC or AVIF image"
    if b"<svg" in data[:1024]:
        return "an SVG image"
    return "something else"


def measure_image(data: bytes) -> tuple[int, int] | None:
    """Return width and height of an image in pixels, by its first bytes; None if unknown."""
    try:
        match find_media_type(data):
            case "image/png":
                return struct.unpack(">II", data[16:24])
            case "image/gif":
                return struct.unpack("<HH", data[6:10])
            case "image/webp":
                return _measure_webp(data)
            case "image/jpeg":
                return _measure_jpeg(data)
            case _:
                return None
    except (struct.error, IndexError):  # cut off or damaged
        return None


def _measure_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""JPEG's markers of a frame, which has the size."""


def _measure_jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:  # noqa: PLR2004 - each marker begins with it
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def count_image_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Estimate the tokens of all images in messages: one for each 28 by 28 pixels, within limits.

    Models count differently: Qwen2.5-VL counts so, others by tiles or a constant.
    """
    return sum(
        _count_tokens(part)
        for message in messages
        if type(content := message.get("content")) is list
        for part in content
        if is_image(part)
    )


def is_image(part: Any) -> bool:
    """Return True if a part of a message is an image."""
    return isinstance(part, Mapping) and part.get("type") == IMAGE_PART


def _read_url(part: Mapping[str, Any]) -> str | None:
    held = part.get(IMAGE_PART)
    url = held.get("url") if isinstance(held, Mapping) else held
    return url if isinstance(url, str) else None


def _read_head(url: str) -> bytes | None:
    """Return the first bytes of the image in a data URL; None if there is none."""
    found = _DATA.match(url)
    if found is None:
        return None
    whole = 4 * (HEAD_BYTES // 3)  # whole groups of base64
    try:
        return base64.b64decode(url[found.end() : found.end() + whole])
    except binascii.Error:
        return None


def _count_tokens(part: Mapping[str, Any]) -> int:
    url = _read_url(part)
    head = None if url is None else _read_head(url)
    size = None if head is None else measure_image(head)
    if size is None:
        return _UNKNOWN_TOKENS
    width, height = size
    return max(_LEAST_TOKENS, min(_MOST_TOKENS, -(-width // _PATCH) * -(-height // _PATCH)))


def read_media_type(url: str) -> str | None:
    """Return the media type of the image in a data URL; None if there is none."""
    data = _read_head(url)
    return None if data is None else find_media_type(data)


def read_text(content: Json) -> str:
    """Return the text of a message's content: a text, or a list with parts of text."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if not is_image(part))


def add_images(messages: Sequence[Message], images: Sequence[ItemImage]) -> list[Message]:
    """Return messages with images after the text of the last one."""
    return _add_parts(messages, [image.to_part() for image in images])


def add_unread_images(
    messages: Sequence[Message], row: Row, columns: Sequence[str]
) -> list[Message]:
    """Return messages with a part for each image that columns name; the images are not read."""
    values = [row.get(column) for column in columns]
    count = sum(len(value) if isinstance(value, list) else 1 for value in values)
    return _add_parts(messages, [{"type": IMAGE_PART, IMAGE_PART: {"url": ""}}] * count)


def _add_parts(messages: Sequence[Message], parts: Sequence[dict[str, Json]]) -> list[Message]:
    if not parts:
        return list(messages)
    *before, last = messages
    return [*before, {**last, "content": [{"type": "text", "text": last["content"]}, *parts]}]


def show_content(content: Json) -> str:
    """Return a message's content as text, with a line for each image."""
    if isinstance(content, str):
        return content
    return "\n".join(
        _describe_part(part) if is_image(part) else str(part.get("text")) for part in content
    )


def _describe_part(part: Mapping[str, Any]) -> str:
    url = _read_url(part)
    head = None if url is None else _read_head(url)
    if head is None:
        return f"[image {url}]"
    size = measure_image(head)
    pixels = "" if size is None else f", {size[0]:,} x {size[1]:,} pixels"
    return f"[image, {find_media_type(head)}{pixels}]"


def drop_images(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages without their images; the same object if there are none."""
    if not any(type(message.get("content")) is list for message in messages):
        return messages
    return [
        {**message, "content": [part for part in message["content"] if not is_image(part)]}
        if type(message.get("content")) is list
        else message
        for message in messages
    ]


def show_images(messages: Sequence[Message], images: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages with a line for each image at the end of the last one.

    Args:
        messages: Messages without images.
        images: Results of :meth:`ItemImage.describe`.
    """
    *before, last = messages
    lines = (last["content"], *map(describe_image, images))
    return [*before, {**last, "content": "\n".join(lines)}]


_LONG_DATA: Final = re.compile(r"(data:image/[a-z.+-]+;base64,)[A-Za-z0-9+/=]{16,}", re.ASCII)


def mask_images(text: str) -> str:
    """Return a text with the content of data URLs of images left out."""
    return _LONG_DATA.sub(r"\1…", text) if "base64," in text else text
