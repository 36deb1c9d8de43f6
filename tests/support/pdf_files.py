"""Small PDF files: with texts, scanned, and such that unpack to much more than their size."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

_FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
_IMAGE = b"<< /Type /XObject /Subtype /Image /Width 8 /Height 8 /ColorSpace /DeviceGray "
_IMAGE += b"/BitsPerComponent 1 /Length 8 >>\nstream\n\xff\x81\xbd\xa5\xa5\xbd\x81\xff\nendstream"
_BLOCK = 1_000_000


def make_pdf(path: Path, texts: Sequence[str]) -> None:
    """Write a PDF file with one page for each text; a page of an empty text has none."""
    _write(path, [_show(text) for text in texts])


def make_scan(path: Path, texts: Sequence[str]) -> None:
    """Write a PDF file whose pages have a picture, and the text if there is one."""
    _write(path, [b"q 560 0 0 760 20 20 cm /I1 Do Q " + _show(text) for text in texts])


def make_large_pdf(path: Path, content: bytes, size: int) -> None:
    """Write a PDF file with one page that unpacks to a content that is repeated.

    Args:
        path: The file.
        content: What is repeated.
        size: Bytes of the whole page, unpacked.
    """
    packer, block = zlib.compressobj(1), content * (_BLOCK // len(content))
    packed = packer.compress(b"BT /F1 12 Tf 20 700 Td ")
    for _ in range(size // len(block)):
        packed += packer.compress(block)
    packed += packer.compress(b" ET") + packer.flush()
    filters = b"/Filter [/FlateDecode /FlateDecode /FlateDecode] "
    _write(path, [zlib.compress(zlib.compress(packed, 9), 9)], filters)


def _show(text: str) -> bytes:
    return b"BT /F1 12 Tf 20 700 Td (" + text.encode() + b") Tj ET" if text else b""


def _write(path: Path, pages: Sequence[bytes], filters: bytes = b"") -> None:
    """Write a file with these contents of pages."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % len(pages),
        _IMAGE,
    ]
    uses = b"<< /Font << /F1 " + _FONT + b" >> /XObject << /I1 3 0 R >> >>"
    for n, content in enumerate(pages):
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] "
        objects.append(page + b"/Contents %d 0 R /Resources " % (5 + 2 * n) + uses + b" >>")
        head = b"<< /Length %d " % len(content) + filters + b">>"
        objects.append(head + b"\nstream\n" + content + b"\nendstream")
    data, places = b"%PDF-1.4\n", list[int]()
    for number, one in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n" % number + one + b"\nendobj\n"
    start, size = len(data), len(objects) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n" % size
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, start)
    path.write_bytes(data)
