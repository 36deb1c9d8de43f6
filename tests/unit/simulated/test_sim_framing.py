from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.simulated.server import BadFramingError, parse_head, take_chunked_body


def test_head() -> None:
    head = parse_head(
        b"POST /v1/x?a=b HTTP/1.1\r\nHost: h\r\nContent-Length:  12\r\nX-Request-Id: Run-1\r\n"
        b"Expect: 100-continue"
    )
    assert (head.method, head.path, head.query, head.length) == ("POST", "/v1/x", "a=b", 12)
    assert head.header(b"x-request-id") == "Run-1"
    assert head.header(b"authorization") is None
    assert head.keep_alive
    assert head.expects_continue
    assert not head.chunked


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [
        (b"1.1", b"close", False),
        (b"1.1", b"keep-alive", True),
        (b"1.0", b"", False),
        (b"1.0", b"Keep-Alive", True),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, keep: bool) -> None:
    head = parse_head(b"GET / HTTP/%b\r\nConnection: %b" % (version, connection))
    assert head.keep_alive is keep


@pytest.mark.parametrize(
    "data", [b"", b"GET /", b"GET / FTP/1.0", b"GET / HTTP/1.1\r\nContent-Length: many"]
)
def test_no_head(data: bytes) -> None:
    with pytest.raises(BadFramingError):
        parse_head(data)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.binary(max_size=10))
def test_chunks_join_whatever_the_cuts(chunks: list[bytes], after: bytes) -> None:
    sent = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    buffer = bytearray()
    for place in range(len(sent) - 1):
        buffer.append(sent[place])
        assert take_chunked_body(buffer) is None
    buffer += sent[-1:] + after
    assert take_chunked_body(buffer) == b"".join(chunks)
    assert bytes(buffer) == after


def test_a_chunk_needs_a_size() -> None:
    with pytest.raises(BadFramingError):
        take_chunked_body(bytearray(b"zz\r\n"))
