from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.sources import parse_endpoints_file
from fanfold.backends.fleet.endpoint import EndpointSpec, make_label, normalize_base_url

BOTH = """\ufeff# written by a launcher
x4616c3s4b0n0:8001\r
x4616c3s4b0n0:8002

nodeA\t8003\tmodel=m\tmax_in_flight=64\tweight=2
nodeB\tmodel=m
https://gw.example/api/v1\tmodel=big
[fe80::1]:8000
X4616C3S4B0N0:8001
"""


def test_one_parser_reads_all_formats() -> None:
    specs = parse_endpoints_file(BOTH, "f", "k")
    assert [s.url for s in specs] == [
        "http://x4616c3s4b0n0:8001",
        "http://x4616c3s4b0n0:8002",
        "http://nodeA:8003",
        "http://nodeB:8000",
        "https://gw.example/api/v1",
        "http://[fe80::1]:8000",
    ]
    assert specs[2] == EndpointSpec(
        "http://nodeA:8003", "k", model="m", max_in_flight=64, weight=2.0
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a:8000\t8001", "column 2"),
        ("a 8000", "TAB"),
        ("a:0", "port"),
        ("a:70000", "65535"),
        ("a\t99999", "65535"),
        ("fe80::1", "brackets"),
        ("a:80x", "host:port"),
        ("ftp://a", "http"),
        ("a:1\tweight=fast", "number"),
        ("a:1\tweight=0", "positive"),
        ("a:1\tmax_in_flight=-1", "positive"),
    ],
)
def test_bad_lines_are_named(line: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        parse_endpoints_file(f"# one\n\n{line}\n", "hosts.txt")
    assert caught.value.message.startswith("hosts.txt, line 3: ")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="lists no endpoint"):
        parse_endpoints_file("# nothing\n", "f")


@given(st.text(max_size=60))
def test_any_text_gives_endpoints_or_a_clear_error(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        assert parse_endpoints_file(text, "f")


@pytest.mark.parametrize(
    ("url", "base", "label"),
    [
        ("http://h:8000", "http://h:8000/v1", "h:8000"),
        ("http://h:8000/v1/", "http://h:8000/v1", "h:8000"),
        ("http://u:secret@H:1/node-3/v1", "http://h:1/node-3/v1", "h:1/node-3"),
        ("https://h/x/vllm/v2", "https://h/x/vllm/v2", "h/x/vllm"),
    ],
)
def test_urls_have_one_spelling(url: str, base: str, label: str) -> None:
    assert (normalize_base_url(url), make_label(url)) == (base, label)


@pytest.mark.parametrize(
    "url", ["h:8000", "", "http://", "http://h:99999", "http://h/v1?key=secret", "http://h:0"]
)
def test_malformed_urls_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        normalize_base_url(url)
    assert "secret" not in caught.value.message
