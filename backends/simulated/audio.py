"""Transcriptions and translations of audio, as vLLM answers them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from .server import Exchange
from .values import ApiError, SeededRandom, draw_prose, hash_parts

_BOUNDARY: Final = re.compile(r"multipart/form-data;.*\bboundary=\"?([^\";]{1,70})", re.IGNORECASE)
_NAME: Final = re.compile(rb'content-disposition: form-data;.*?\bname="([^"]*)"', re.IGNORECASE)
_LARGEST: Final = 25 * 2**20
_FORMATS: Final = ("json", "text", "verbose_json")
_BYTES_PER_S: Final = 16_000
"""Length of a second of audio: its content is not read."""
_TOKENS_PER_S: Final = 4
_LONGEST_S: Final = 600


def read_form(exchange: Exchange) -> dict[str, Any]:
    """Return the members of a form: texts, and digest and size of the member ``file``.

    Raises:
        ApiError: 422: it is no form, or has no file; 400: the file is too large.
    """
    found = _BOUNDARY.search(exchange.head.header(b"content-type") or "")
    if found is None:
        raise ApiError("Field required: file", status=422, param="file")
    data = dict[str, Any]()
    for part in exchange.body.split(b"--" + found[1].encode())[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if name is None:
            raise ApiError("a part of the form has no name", status=422)
        value = value.removesuffix(b"\r\n")
        key = name[1].decode(errors="replace")
        if b"filename=" in head:
            data[key] = {"sha256": hashlib.sha256(value).hexdigest(), "bytes": len(value)}
        else:
            data[key] = value.decode(errors="replace")
    file = data.get("file")
    if not isinstance(file, dict):
        raise ApiError("Field required: file", status=422, param="file")
    if file["bytes"] > _LARGEST:
        raise ApiError("Maximum file size exceeded", param="audio_filesize_mb")
    return data


def answer_audio(data: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the text of a file; equal files give equal texts.

    Args:
        data: The members of the form.
        seed: Seed of the fleet.

    Raises:
        ApiError: 400: the format of the answer is unknown, or the file is empty.
    """
    form, file = data.get("response_format") or "json", data["file"]
    if form not in _FORMATS:
        raise ApiError("Currently only support response_format: `text`, `json` or `verbose_json`")
    if not file["bytes"]:
        raise ApiError("Invalid or unsupported audio file.", param="file")
    seconds = min(_LONGEST_S, -(-file["bytes"] // _BYTES_PER_S))
    key = hash_parts(seed, file["sha256"], data.get("language") or "")
    text = draw_prose(SeededRandom(key), _TOKENS_PER_S * seconds)
    usage = {"type": "duration", "seconds": seconds}
    answer: dict[str, Any] = {"text": text, "usage": usage}
    if form == "verbose_json":
        segment = {"id": 0, "start": 0.0, "end": float(seconds), "text": text}
        language = data.get("language") or "en"
        answer |= {"duration": seconds, "language": language, "segments": [segment]}
    return answer
