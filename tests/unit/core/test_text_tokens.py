"""Parts of texts: nothing is lost, none is too long, and the same text has the same parts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.text_tokens import (
    estimate_text_tokens,
    halve_text,
    split_text,
)

PROSE = "A sentence of several words ends here. Another one follows it, and is longer.\n\n" * 200


@pytest.mark.parametrize(("tokens", "overlap"), [(50, 0), (50, 10), (300, 100), (20, 9)])
@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "ACGT" * 5000,  # no place to cut
        "岩石とその鉱物。" * 500,
        "12345 " * 1000,
        "\n" * 3000,
        "a b" + " " * 5000 + "c" * 3000,
        "x\ud800y" * 500,
    ],
)
def test_parts_cover_the_text_and_are_short(text: str, tokens: int, overlap: int) -> None:
    parts = list(split_text(text, tokens, overlap))
    assert parts[0][0] == 0
    assert parts[-1][1] == len(text)
    for (start, end), (following, _) in pairwise(parts):
        assert start < following <= end
        assert estimate_text_tokens(text[following:end]) <= overlap + 4
    for start, end in parts:
        assert start < end
        assert estimate_text_tokens(text[start:end]) <= tokens + 4  # a run that is cut counts twice
    assert parts == list(split_text(text, tokens, overlap))


@pytest.mark.parametrize("overlap", [0, 10, 1000])
@pytest.mark.parametrize(
    "text",
    [PROSE, "ACGT" * 5000, "岩石とその鉱物。" * 500, "12345 " * 1000, " " * 5000 + "岩石。" * 90],
)
def test_halves_are_cut_near_the_middle(text: str, overlap: int) -> None:
    (first, end), (start, last) = halve_text(text, overlap)
    assert (first, last) == (0, len(text))
    assert 0 < start <= end < len(text)
    whole = estimate_text_tokens(text)
    for half in (text[:end], text[start:]):
        assert whole / 3 < estimate_text_tokens(half) < 0.8 * whole
    assert estimate_text_tokens(text[start:end]) <= min(overlap, whole // 8) + 4


def test_a_short_text_has_no_halves() -> None:
    assert halve_text("short") == halve_text("") == []


@given(st.text(alphabet=st.sampled_from("a7 \n.岩。"), max_size=1500), st.integers(0, 99))
def test_halves_of_halves_come_to_an_end(text: str, overlap: int) -> None:
    texts, depth = [text], 0
    while texts := [one[lo:hi] for one in texts for lo, hi in halve_text(one, overlap)]:
        depth += 1
        assert all(texts)
        assert depth < 12


def test_cuts_are_between_paragraphs_or_sentences() -> None:
    (_, end), (start, _) = halve_text(PROSE)
    assert PROSE[:end].endswith("\n\n")
    assert start == end
    for start, end in split_text(PROSE, 100, 0):
        assert PROSE[start:end].endswith("\n\n")
    text = PROSE.replace("\n\n", " ")
    for start, end in split_text(text, 50, 0):
        assert text[start:end].rstrip().endswith(".")


def test_a_short_text_is_one_part() -> None:
    assert list(split_text("short", 20, 5)) == [(0, 5)]
    assert list(split_text("", 20, 5)) == [(0, 0)]


@given(st.text(max_size=600), st.integers(20, 60), st.integers(0, 9))
def test_any_text_is_covered(text: str, tokens: int, overlap: int) -> None:
    at = 0
    for start, end in split_text(text, tokens, overlap):
        assert start <= at
        at = end
    assert at == len(text)


@given(st.text(st.sampled_from("abcXY019 .,;\n\t\r\x1c\v-_()é日\u3000\u00a0"), max_size=60))
def test_the_estimate_of_a_text_is_the_sum_over_its_runs(text: str) -> None:
    """The estimate takes words that it remembers; parts are measured run by run."""
    for one in (text, text.encode("ascii", "ignore").decode()):
        tokens = estimate_text_tokens(one)
        assert list(split_text(one, tokens, 0)) == [(0, len(one))]
        if tokens > 1:
            assert len(list(split_text(one, tokens - 1, 0))) > 1
