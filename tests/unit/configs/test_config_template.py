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
    with pytest.raises(InvalidItemError, match=r"no column|not an object"):
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


FIELDS = st.lists(st.text("ab.", min_size=1), min_size=1, max_size=4).map(".".join)


@given(FIELDS, st.text())
def test_a_column_with_dots_wins_over_a_field(name: str, value: str) -> None:
    hidden: Any = "hidden"
    for key in reversed(name.split(".")[1:]):
        hidden = {key: hidden}
    row = {name.partition(".")[0]: hidden, name: value}
    if name.strip():
        assert Template.parse(f"<{{{name}}}>").render(row) == f"<{value}>"


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=4), st.text())
def test_fields_inside_columns_are_found(keys: list[str], value: str) -> None:
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    template = Template.parse(f"{{plain}} {{col.{'.'.join(keys)}}}")
    assert template.render({"plain": "x", "col": nested}) == f"x {value}"
    dotted = Template.parse(f"{{col.umn.{'.'.join(keys)}}}")  # the column has a dot in its name
    assert dotted.render({"col": "text", "col.umn": nested}) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (None, ""), ({"b": [1]}, '{"b":[1]}'), (["x"], '["x"]'), (False, "false")],
)
def test_values_of_fields(value: Any, shown: str) -> None:
    assert Template.parse("{a.v}").render({"a": {"v": value}}) == shown


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no column 'output.meta.score', which task.prompt uses"),
        ({"output": None}, "'output' is null, not an object"),
        ({"output": '{"meta": {"score": 1}}'}, "'output' is text, not an object; text is not"),
        ({"output": [{"meta": 1}]}, "'output' is a list, not an object"),
        ({"output": 3}, "'output' is a number, not an object"),
        ({"output": True}, "'output' is a boolean, not an object"),
        ({"output": {}}, "'output' has no field 'meta'"),
        ({"output": {"meta": {"scores": 1}}}, "'output.meta' has no field 'score'"),
    ],
)
def test_missing_fields_are_named(row: Any, message: str) -> None:
    with pytest.raises(InvalidItemError, match=message) as caught:
        Template.parse("Judge {output.meta.score}").render(row)
    assert "output.meta.score" in caught.value.message
