"""Images of items: what is read, what is refused, and what stays out of records."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError, InvalidItemError
from fanfold.backends.core.images import (
    ItemImage,
    add_images,
    count_image_tokens,
    drop_images,
    find_media_type,
    mask_images,
    measure_image,
    show_content,
    show_images,
)
from fanfold.backends.core.parsing import read_message_text
from fanfold.backends.core.types import Item
from fanfold.backends.fleet.request import max_usage
from fanfold.backends.inputs.images import MOST_IMAGE_BYTES, CarriedImages, ImageFolder
from fanfold.graphs.remote.task_template import pack_items
from fanfold.nodes.shard.record import ItemDigests


def make_png(width: int, height: int, noise: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (width + 1) * height)
    text = chunk(b"tEXt", b"note\0" + noise)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", rows)


JPEG = b"\xff\xd8\xff\xe1\x00\x08Exif\0\0" + b"\xff\xc2\x00\x11\x08\x01\x2c\x02\x58\x03" + b"\0" * 9
GIF = b"GIF89a" + struct.pack("<HH", 70, 50)
WEBP = {
    "VP8X": b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + b"\x3f\x01\x00" + b"\xef\x00\x00",
    "VP8 ": b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 320, 240),
    "VP8L": b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + (319 | 239 << 14).to_bytes(4, "little"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "in"
    (found / "sub").mkdir(parents=True)
    (found / "a.png").write_bytes(make_png(640, 480))
    (found / "sub" / "b.jpg").write_bytes(JPEG)
    return found


def load(folder: Path | None, name: Any, *, urls: bool = False) -> list[ItemImage]:
    return ImageFolder(folder, ("figure",), urls).load({"figure": name})


@pytest.mark.parametrize(
    ("data", "media", "size"),
    [
        (make_png(640, 480), "image/png", (640, 480)),
        (JPEG, "image/jpeg", (600, 300)),
        (GIF, "image/gif", (70, 50)),
        *((data, "image/webp", (320, 240)) for data in WEBP.values()),
        (make_png(640, 480)[:20], "image/png", None),
        (b"\xff\xd8\xff\xe0\x00\x00", "image/jpeg", None),
        (b"", None, None),
    ],
)
def test_kinds_and_sizes(data: bytes, media: str | None, size: tuple[int, int] | None) -> None:
    assert (find_media_type(data), measure_image(data)) == (media, size)
    assert measure_image(data[:9]) is None or media == "image/gif"


def test_files_below_the_folder(folder: Path) -> None:
    """By relative and absolute paths, several, links within the folder, and a folder by a link."""
    (folder / "same.png").symlink_to("a.png")
    (folder.parent / "other").symlink_to(folder)
    data = (folder / "a.png").read_bytes()
    (image,) = load(folder, "a.png")
    assert image.url == f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert image.describe() == {
        "column": "figure",
        "name": "a.png",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert [one.size for one in load(folder, ["sub/b.jpg", " a.png "])] == [len(JPEG), len(data)]
    for name in (str(folder / "a.png"), "same.png", "sub/../a.png"):
        assert load(folder, name)[0].sha256 == image.sha256
    assert load(folder.parent / "other", "a.png")[0].sha256 == image.sha256
    assert load(folder, []) == []
    inner = ImageFolder(folder, ("x.figure",)).load({"x": {"figure": "a.png"}})
    assert inner[0].sha256 == image.sha256


def test_what_is_no_image_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(make_png(5, 5))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "x.pdf").write_bytes(b"%PDF-1.7")
    (folder / "x.svg").write_bytes(b"<?xml?><svg/>")
    (folder / "empty.png").write_bytes(b"")
    with (folder / "big.png").open("wb") as file:
        file.write(make_png(5, 5))
        file.truncate(MOST_IMAGE_BYTES + 1)
    refused = {
        "../secret.png": "not below the folder",
        str(tmp_path / "secret.png"): "not below the folder",
        "link.png": "not below the folder",
        "up/secret.png": "not below the folder",
        "none.png": "no such file",
        "a.png/b": "cannot be read",
        "loop": "cannot be read",
        "sub": "cannot be read: Is a directory",
        "pipe": "is not a file",
        "x\0.png": "cannot be read",
        "x" * 300: "cannot be read",
        "x.pdf": "is a PDF; images are PNG, JPEG, WebP or GIF",
        "x.svg": "is an SVG image",
        "empty.png": "is an empty file",
        "big.png": "has 20,000,001 bytes; images have at most 20,000,000",
        "http://x.org/a.png": "needs task.images.urls: true",
        "file:///etc/passwd": "neither a file nor an http URL",
        "data:image/png;base64,AAAA": "neither a file nor an http URL",
        "": "names no image",
    }
    for name, said in refused.items():
        with pytest.raises(InvalidItemError) as caught:
            load(folder, name)
        assert said in caught.value.message, name
        assert len(caught.value.message) < 500
    for value in (None, 3, [None], {"x": 1}):
        with pytest.raises(InvalidItemError, match="names no image"):
            load(folder, value)
    with pytest.raises(InvalidItemError, match=r"task\.images uses"):
        ImageFolder(folder, ("x.y",)).load({"x": 1})
    with pytest.raises(InvalidItemError, match="have no folder"):
        load(None, "a.png")
    with pytest.raises(ConfigurationError, match=r"set task.images.folder.*backend.shared_folder"):
        load(tmp_path / "nowhere", "a.png")


def test_urls_are_passed_on(folder: Path) -> None:
    (image,) = load(None, "https://x.org/a.png?b=c", urls=True)
    assert (image.url, image.size) == ("https://x.org/a.png?b=c", None)
    assert len(load(folder, ["HTTP://x.org/a", "a.png"], urls=True)) == 2
    for name in ("http://", "http://x.org/a b", "https://x.org/ü", "ftp://x.org/a", "http://[x/"):
        with pytest.raises(InvalidItemError):
            load(folder, name, urls=True)


def test_messages_and_their_tokens(folder: Path) -> None:
    """Images count by their size in pixels, and never by the length of their base64."""
    images = load(folder, ["a.png", "sub/b.jpg"])
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "What?"}]
    messages = add_images(asked, images)
    assert messages[1]["content"][0] == {"type": "text", "text": "What?"}
    assert [part["image_url"]["url"] for part in messages[1]["content"][1:]] == [
        image.url for image in images
    ]
    assert add_images(asked, []) == asked
    assert count_image_tokens(messages) == 23 * 18 + 256  # at least 256 each
    assert count_image_tokens(add_images(asked, load(None, "http://x.org/a", urls=True))) == 2048
    assert read_message_text(messages[1]) == "What?"
    assert drop_images(asked) is asked
    plain, whole = (max_usage({"messages": one}).prompt or 0 for one in (asked, messages))
    assert plain < whole < plain + 23 * 18 + 256 + 100
    shown = show_content(messages[1]["content"])
    assert shown.splitlines() == [
        "What?",
        "[image, image/png, 640 x 480 pixels]",
        "[image, image/jpeg, 600 x 300 pixels]",
    ]
    (_, last) = show_images(asked, [image.describe() for image in images])
    assert last["content"].splitlines()[1].startswith("[image a.png, ")
    assert images[0].sha256[:16] in last["content"]
    heads = ImageFolder(folder, ("figure",)).load_heads({"figure": "a.png"})
    assert count_image_tokens(add_images(asked, heads)) == 23 * 18


def test_the_question_has_the_content_of_images(folder: Path) -> None:
    digests = ItemDigests(b"common", 0, b"")
    asked = [{"role": "user", "content": "What?"}]

    def question(name: str) -> str | None:
        images = load(folder, name)
        told = [image.describe() for image in images]
        seen = digests.compute_question(add_images(asked, images), 0, told)
        assert seen == digests.compute_question(asked, 0, told)
        return seen

    before = question("a.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    assert question("copy.png") == before != digests.compute_question(asked)
    (folder / "a.png").write_bytes(make_png(640, 480, b"other"))
    assert question("a.png") != before


def test_data_urls_are_masked() -> None:
    url = "data:image/png;base64," + "A" * 100
    assert mask_images(f"bad image {url} here") == "bad image data:image/png;base64,… here"
    assert mask_images("nothing") == "nothing"


async def test_images_that_travel_with_their_items(folder: Path) -> None:
    """As many items as fit; one whose images do not fit fails, and the others go on."""
    (folder / "a.png").write_bytes(make_png(9, 9, bytes(range(256)) * 40))
    (folder / "large.png").write_bytes(make_png(9, 9, bytes(range(256)) * 400))
    names = ["a.png", "large.png", "none.png", "a.png", "a.png"]
    items = [Item(n, f"i{n}", {"figure": name}) for n, name in enumerate(names)]
    packed, carried = pack_items(items, ImageFolder(folder, ("figure",)), 35_000)
    assert [item[1] for item in packed] == ["i0", "i1", "i2", "i3"]
    assert carried is not None
    assert [len(carried[item[1]]) for item in packed] == [1, 0, 0, 1]
    assert "backend.shared_folder: true" in str(packed[1][3])
    assert "no such file" in str(packed[2][3])
    (image,) = await CarriedImages.from_json(carried).read("i3", {})
    assert image == load(folder, "a.png")[0]
    assert pack_items(items, None, 35_000)[1] is None
