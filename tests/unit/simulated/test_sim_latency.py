from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.simulated.node import LatencyModel
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import (
    SeededRandom,
    count_chat_tokens,
    count_text_tokens,
    draw_normal,
    draw_uniform,
    hash_parts,
    truncate_tokens,
)


def exact(**changes: object) -> LatencyModel:
    spec = {"ttft_s": 0.1, "prefill_rate": 1000, "tpot_s": 0.01, "alpha": 0.5, "jitter": 0.0}
    return LatencyModel(SimulationSpec.from_mapping({**spec, **changes}))


def test_the_formula() -> None:
    timing = exact().compute_timing(prompt=200, output=50, load=0.0, speed=1.0, key=())
    assert timing.first_s == pytest.approx(0.1 + 0.2)
    assert timing.total_s == pytest.approx(0.3 + 0.5)


def test_a_loaded_node_is_slower_per_token() -> None:
    timing = exact().compute_timing(prompt=200, output=50, load=1.0, speed=1.0, key=())
    assert timing.first_s == pytest.approx(0.3)
    assert timing.total_s == pytest.approx(0.3 + 0.5 * 1.5)


def test_speed_and_scale_divide() -> None:
    timing = exact(time_scale=10).compute_timing(prompt=200, output=50, load=0.0, speed=0.1, key=())
    assert timing.total_s == pytest.approx(0.8)


def test_jitter_is_seeded_and_keeps_the_order_of_events() -> None:
    model = exact(jitter=0.5, seed=3)
    times = [model.compute_timing(100, 10, 0.0, 1.0, (b"k", n)) for n in range(200)]
    assert times == [model.compute_timing(100, 10, 0.0, 1.0, (b"k", n)) for n in range(200)]
    assert len({t.total_s for t in times}) == 200
    assert all(0 < t.first_s < t.total_s for t in times)


def test_chance_is_uniform_and_normal_is_normal() -> None:
    uniform = [draw_uniform("seed", n) for n in range(4000)]
    assert sum(uniform) / 4000 == pytest.approx(0.5, abs=0.02)
    assert sum(u < 0.1 for u in uniform) == pytest.approx(400, abs=60)
    drawn = [draw_normal("seed", n) for n in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(0, abs=0.06)
    assert sum(x * x for x in drawn) / 4000 == pytest.approx(1, abs=0.1)


def test_digest_keeps_parts_apart() -> None:
    assert hash_parts("ab", "c") != hash_parts("a", "bc")
    assert hash_parts("ab", 1) == hash_parts(b"ab", "1")


@given(st.integers(1, 1 << 200), st.binary(max_size=8))
def test_dice_stay_below_their_bound(bound: int, key: bytes) -> None:
    dice = SeededRandom(key)
    assert all(0 <= dice.below(bound) < bound for _ in range(20))


@given(st.text(), st.integers(0, 50))
def test_cut_keeps_a_beginning_of_at_most_so_many_tokens(text: str, tokens: int) -> None:
    short = truncate_tokens(text, tokens)
    assert text.startswith(short)
    assert count_text_tokens(short) <= tokens
    assert short == text or count_text_tokens(text) > tokens or count_text_tokens(short) == tokens


def test_tokens_of_a_conversation() -> None:
    parts = [{"type": "text", "text": "abcd"}, {"type": "text", "text": "efg"}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "12345678"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    assert count_chat_tokens(messages) == 3 + (2 + 4) + (2 + 4) + (3 + 4)
    assert count_text_tokens("ü" * 4) == 2
