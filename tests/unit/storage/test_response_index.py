from __future__ import annotations

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.storage.response_files import KeyIndex


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8), digest_size=16).digest()


CHANGE = st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 2**62))
CHANGES = st.lists(CHANGE, max_size=400)


@given(CHANGES)
def test_it_is_a_mapping(changes: list[tuple[bool, int, int]]) -> None:
    """Keys that share part and slot are those that a hash table gets wrong."""
    index, model = KeyIndex(), dict[bytes, int]()
    for puts, number, place in changes:
        name = (16 * number).to_bytes(8) + bytes(8)
        if puts:
            index.put(name, place)
            model[name] = place
        else:
            index.forget(name)
            model.pop(name, None)
    assert len(index) == len(model)
    for number in range(41):
        name = (16 * number).to_bytes(8) + bytes(8)
        assert index.find(name) == model.get(name)


def test_it_holds_many() -> None:
    index, numbers = KeyIndex(), list(range(20_000))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        index.put(key(number), number)
    assert len(index) == 20_000
    assert all(index.find(key(number)) == number for number in numbers)
    assert all(index.find(key(number)) is None for number in range(20_000, 40_000))


def test_what_is_forgotten_and_put_again_takes_no_room() -> None:
    index = KeyIndex()
    for number in range(5_000):
        index.put(key(number), number)
        index.forget(key(number))
    assert len(index) == 0
    room = sum(len(part.keys) for part in index._parts)
    assert room <= 256 * 32
