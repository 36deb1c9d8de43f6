from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError, InvalidItemError
from fanfold.backends.core.templates import Template

NAMES = st.text(min_size=1).filter(lambda t: not set(t) & set("{}") and t == t.strip())


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@given(st.text(), NAMES, st.text(), st.text())
def test_text_and_values_stand_as_they_are(before: str, name: str, value: str, after: str) -> None:
    template = Template.parse(f"{escaped(before)}{{{name}}}{escaped(after)}")
    assert template.columns == (name,)
    assert template.render({name: value}) == before + value + after


@given(st.text())
def test_any_text_is_a_template_or_refused(text: str) -> None:
    with suppress(ConfigurationError):
        template = Template.parse(text)
        row = dict.fromkeys(template.columns, "{x} {0} %s ${HOME}")
        assert isinstance(template.render(row), str)


class Trap:
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.mark.parametrize("name", ["x.__class__", "x[0]", "0", "x!r", "x:>10", "__import__('os')"])
def test_nothing_is_looked_up_or_run(name: str) -> None:
    template = Template.parse(f"<{{{name}}}>")
    assert template.render({name: "v", "x": Trap()}) == "<v>"
    with pytest.raises(InvalidItemError, match="no column"):
        template.render({"x": Trap()})


@pytest.mark.parametrize("text", ["{", "}", "a {b", "a} b", "{}", "{ }", "{a{b}}", "{{a}"])
def test_lone_braces(text: str) -> None:
    with pytest.raises(ConfigurationError, match="unmatched brace"):
        Template.parse(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a{b}", "a{b}"),
        (None, ""),
        (1.5, "1.5"),
        (True, "true"),
        ([1, {"a": "ü"}], '[1,{"a":"ü"}]'),
    ],
)
def test_values(value: Any, shown: str) -> None:
    assert Template.parse("{v}").render({"v": value}) == shown
