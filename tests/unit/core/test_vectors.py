"""Vectors in answers of servers: what is no vector fails its item with a message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fanfold.backends.core.errors import InvalidAnswerError
from fanfold.backends.core.vectors import pack_answer, unpack_halves


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"data": None},
        {"data": []},
        {"data": ["x"]},
        {"data": [{}]},
        *(
            {"data": [{"embedding": found}]}
            for found in (
                None,
                [],
                "",
                "no base64!",
                "AAA=",
                [0, 0.0],
                ["1", "2"],
                [True, False],
                [1, None],
                [math.inf, 1],
                [math.nan],
                [10**400],
                {"0": 1},
            )
        ),
    ],
)
def test_what_is_no_vector_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidAnswerError):
        pack_answer(document)


def test_vectors_have_unit_length_and_two_bytes_a_number() -> None:
    packed = pack_answer({"data": [{"embedding": [1e30, -1e30, 0]}]})
    assert len(unpack_halves(packed)) == 6


@pytest.mark.parametrize("text", ["", "A", "AAAA", "AAAAAAA="])
def test_damaged_vectors_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is that of base64 or ours
        unpack_halves(text)
