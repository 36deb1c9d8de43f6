"""Images of items: files below the input's folder, or URLs where they are allowed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ..core.errors import ConfigurationError, InvalidItemError
from ..core.images import HEAD_BYTES, ItemImage, find_media_type, name_other_type
from ..core.templates import read_field
from ..core.types import Json, Row

if TYPE_CHECKING:
    from ...configs.models import RunConfig

MOST_IMAGE_BYTES: Final = 20_000_000
_MOST_IMAGES: Final = 100
"""Images of one item."""
_MOST_URL: Final = 8_192
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):")
_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """The folder with the images of a run's items.

    Attributes:
        folder: The folder; None if only URLs are allowed.
        columns: Columns that name images.
        urls: Whether an image may be a URL, which the model's server loads.
    """

    folder: Path | None
    columns: tuple[str, ...]
    urls: bool = False

    async def read(self, item_id: str, row: Row) -> list[ItemImage]:  # noqa: ARG002 - the protocol
        """Read the images of an item in a thread.

        Raises:
            InvalidItemError: One is missing, too large, of another type, or not below the folder.
            ConfigurationError: The folder is not there.
        """
        return await asyncio.to_thread(self.load, row)

    def load(self, row: Row) -> list[ItemImage]:
        """Read the images of an item; blocks.

        Raises:
            InvalidItemError: One is missing, too large, of another type, or not below the folder.
            ConfigurationError: The folder is not there.
        """
        return self._load(row, None)

    def load_heads(self, row: Row) -> list[ItemImage]:
        """Read the beginning of each image, which tells its size in pixels; blocks.

        Raises:
            InvalidItemError: As for :meth:`load`.
            ConfigurationError: The folder is not there.
        """
        return self._load(row, HEAD_BYTES)

    def _load(self, row: Row, most: int | None) -> list[ItemImage]:
        named = [(column, name) for column in self.columns for name in _list_names(row, column)]
        if len(named) > _MOST_IMAGES:
            msg = f"the row names {len(named):,} images; at most {_MOST_IMAGES} are sent"
            raise InvalidItemError(msg)
        return [self._load_one(column, name, most) for column, name in named]

    def _load_one(self, column: str, name: str, most: int | None) -> ItemImage:
        if (found := _SCHEME.match(name)) is not None:
            self._check_url(column, name, (found[1] or found[2]).lower())
            digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()
            return ItemImage(column, name, name, digest)
        data, size = self._read_file(column, name, most)
        media = find_media_type(data)
        if media is None:
            msg = (
                f"{_place(column, name)} is {name_other_type(data)}; images are PNG, JPEG, WebP "
                "or GIF: convert it"
            )
            raise InvalidItemError(msg)
        url = f"data:{media};base64,{base64.b64encode(data).decode()}"
        return ItemImage(column, name, url, hashlib.sha256(data).hexdigest(), size)

    def _check_url(self, column: str, name: str, scheme: str) -> None:
        """Check that an image may be a URL.

        Raises:
            InvalidItemError: It may not.
        """
        if scheme not in ("http", "https"):
            msg = f"{_place(column, name)} is neither a file nor an http URL"
        elif not self.urls:
            msg = (
                f"{_place(column, name)} is a URL; the model's server would load it, which needs "
                "task.images.urls: true"
            )
        elif len(name) > _MOST_URL or not name.isascii() or not name.isprintable() or " " in name:
            msg = f"{_place(column, name)}: invalid URL: write it in ASCII, escaped, without blanks"
        elif not _has_host(name):
            msg = f"{_place(column, name)}: the URL names no host"
        else:
            return
        raise InvalidItemError(msg)

    def _read_file(self, column: str, name: str, most: int | None) -> tuple[bytes, int]:
        """Return the content of a file, or its first bytes, and its size."""
        where = _place(column, name)
        if self.folder is None:
            msg = (
                f"{where} is a file, but items that are given in memory have no folder: set "
                "task.images.folder"
            )
            raise InvalidItemError(msg)
        try:
            root = self.folder.resolve(strict=True)
        except OSError:
            raise ConfigurationError(explain_missing_folder(self.folder)) from None
        path = self._find_file(where, root, name)
        try:
            # the path has no links: one that appears in its place meanwhile is refused
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(number, "rb") as file:
                about = os.fstat(number)
                data = b""
                if stat.S_ISREG(about.st_mode) and about.st_size <= MOST_IMAGE_BYTES:
                    data = file.read(MOST_IMAGE_BYTES if most is None else most)
        except OSError as error:
            raise InvalidItemError(f"{where} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(about.st_mode):
            raise InvalidItemError(f"{where} is not a file")
        if about.st_size > MOST_IMAGE_BYTES:
            msg = (
                f"{where} has {about.st_size:,} bytes; images have at most "
                f"{MOST_IMAGE_BYTES:,}: shrink it"
            )
            raise InvalidItemError(msg)
        return data, about.st_size

    def _find_file(self, where: str, root: Path, name: str) -> Path:
        """Return the path of a file without links.

        Raises:
            InvalidItemError: There is none, or it is not below the folder.
        """
        try:
            path = (root / name).resolve(strict=True)
        except FileNotFoundError:
            raise InvalidItemError(f"{where}: no such file in {self.folder}") from None
        except (OSError, ValueError, RuntimeError) as error:  # a NUL; a loop of links
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise InvalidItemError(f"{where} cannot be read: {reason}") from None
        if not path.is_relative_to(root):
            msg = f"{where} is not below the folder of the images, {self.folder}"
            raise InvalidItemError(msg)
        return path


def explain_missing_folder(folder: Path) -> str:
    """Return what it means that the folder of the images is not there, in words."""
    return (
        f"the folder of the images, {folder}, is not there; set task.images.folder. Where workers "
        "see it elsewhere, begin it with a variable of theirs (${DATA}/…), or set "
        "backend.shared_folder: false to send the images with the items"
    )


@dataclass(frozen=True, slots=True)
class CarriedImages:
    """The images that came with a task.

    Attributes:
        images: Images by the id of their item.
    """

    images: Mapping[str, Sequence[ItemImage]]

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[Mapping[str, Any]]]) -> CarriedImages:
        """Return the images that a task has, as plain data."""
        return cls(
            {name: [ItemImage.from_json(one) for one in some] for name, some in data.items()}
        )

    async def read(self, item_id: str, row: Row) -> list[ItemImage]:  # noqa: ARG002 - the protocol
        """Return the images of an item."""
        return list(self.images[item_id])


def open_images(config: RunConfig, *, in_memory: bool = False) -> ImageFolder | None:
    """Return what reads the images of a run's items; None if it sends none.

    Args:
        config: The settings.
        in_memory: Whether the items do not come from the configured input: their images must not
            be taken from its folder.
    """
    images = config.task.images
    if images is None:
        return None
    folder = images.folder
    if folder is None and config.input.path is not None and not in_memory:
        return ImageFolder(find_input_folder(config.input.path), tuple(images.columns), images.urls)
    found = None if folder is None else Path(folder)
    return ImageFolder(found, tuple(images.columns), images.urls)


def find_input_folder(path: str) -> Path:
    """Return the folder of an input: itself, or that of a file or a pattern of files."""
    found = Path(path)
    return found if found.is_dir() else found.parent


def _list_names(row: Row, column: str) -> list[str]:
    """Return the names of the images in a column: a text, or a list of texts."""
    value: Json = read_field(row, column, "task.images")
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        msg = (
            f"column {column!r} names no image: give the path of a file, or a list of them (in "
            "JSON lines and Parquet), which may be empty"
        )
        raise InvalidItemError(msg)
    return [name.strip() for name in names]


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:
        return False


def _place(column: str, name: str) -> str:
    shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "…"
    return f"image {shown!r} (column {column!r})"
