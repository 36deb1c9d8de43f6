from __future__ import annotations

import re

import pytest

from fanfold.backends.simulated.values import ApiError, SeededRandom, compile_pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[A-Z]{2,4}-\d+$",
        r"(foo|bar)+x?",
        r"[^a-z]{3}",
        r"^\w+@\w+\.com$",
        r".{2,}?",
        r"a\.b\\c\n",
        r"[a-]b[-z]c[\d_]",
        r"(?:ab){3}(c|)",
        r"^$",
        r"\$",
        r"[\]\-]+\s*",
    ],
)
def test_strings_match(pattern: str) -> None:
    make = compile_pattern(pattern)
    drawn = {make(SeededRandom(b"%d" % n)) for n in range(100)}
    assert all(re.search(pattern, text) for text in drawn)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(?=a)", r"(?P<n>a)", r"\bx", r"(a)\1", r"\p{L}", r"\D", "[[a]]", "[a&&b]"),
        *("a{2000}", "^a|b$", "a^b", "(", ")", "[", "[]", "a{", "[z-a]", "a**", "+", "a|*", "a\\"),
    ],
)
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ApiError, match="too complex"):
        compile_pattern(pattern)
