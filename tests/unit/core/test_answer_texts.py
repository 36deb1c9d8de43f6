"""The reader of answers: reasoning, code fences, lenient JSON, finish reasons."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fanfold.backends.core.errors import InvalidAnswerError, TruncatedAnswerError
from fanfold.backends.core.parsing import classify_finish, parse_answer, split_reasoning
from fanfold.nodes.item.answer import AnswerCheck

GOOD = '{"score": 0.5, "why": "ok"}'
VALUE = {"score": 0.5, "why": "ok"}
SCHEMA = {
    "type": "object",
    "required": ["score"],
    "properties": {"score": {"type": "number"}, "why": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nLet {a: 1}.\n</think>\n\nyes", "Let {a: 1}.", "yes"),
        ("\n <THINK>a</Think>yes", "a", "yes"),
        ("<think></think>yes", "", "yes"),
        ("<think>a</think>b</think>", "a", "b</think>"),
        ("so it is\n</think>\n\nyes", "so it is", "yes"),
        (f"so it is </think> {GOOD}", "so it is", GOOD),
        ("so it is</think>```json\n1\n```", "so it is", "```json\n1\n```"),
        ("the tag </think> ends a block", None, "the tag </think> ends a block"),
        ("write <think> and\n</think>\n", None, "write <think> and\n</think>\n"),
        ("<think>never closed", None, "<think>never closed"),
        ('{"a": "x</think>\n"}', None, '{"a": "x</think>\n"}'),
        ("<b>bold</b>", None, "<b>bold</b>"),
        ("", None, ""),
    ],
)
def test_leading_reasoning_is_split_off(text: str, reasoning: str | None, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)
    assert split_reasoning(text, " ") == (reasoning, answer)
    assert split_reasoning(text, " so\n") == ("so", answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, VALUE),
        (f"```json\n{GOOD}\n```", VALUE),
        (f"```JSON\r\n{GOOD}\r\n```\r\n", VALUE),
        (f"```json {GOOD} ```", VALUE),
        (f"```{GOOD}```", VALUE),
        (f"```json{GOOD}```", VALUE),
        (f"~~~json5\n{GOOD}\n~~~", VALUE),
        (f"````\n{GOOD}\n````", VALUE),
        (f"```json\n{GOOD}", VALUE),
        (f"Here is the JSON:\n```json\n{GOOD}\n```\nHope that helps!", VALUE),
        (f"```py\nx = 1\n```\nso\n```json\n{GOOD}\n```", VALUE),
        ('```json\n{"score": 1, "why": "```py\\n```"}\n```', {"score": 1, "why": "```py\n```"}),
        (f"\ufeff{GOOD}", VALUE),
        (
            '{"score": 1, "why": "two\nlines\tand a tab"}',
            {"score": 1, "why": "two\nlines\tand a tab"},
        ),
        ('{"score": 1, "why": "\x00"}', {"score": 1, "why": "\x00"}),
        ('{"score": 1, "why": "\\ud83d"}', {"score": 1, "why": "?"}),
        ('```\n{"score": 1, "why": "a\nb"}\n```', {"score": 1, "why": "a\nb"}),
        ('{"score": 1, "low": -Infinity, "odd": NaN}', {"score": 1, "low": None, "odd": None}),
        ('draft ```{"score": 1}``` final ```{"score": 2}```', {"score": 2}),
        ('```{"score": 1}``` as in ```{"x": 2}```', {"score": 1}),
    ],
)
def test_good_answers_are_kept(text: str, value: Any) -> None:
    assert AnswerCheck(SCHEMA, 9).check_value(text) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sorry", "not valid JSON: unexpected character"),
        ("`" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ("```json\nno\n```", "not valid JSON"),
        ("``` ```", "not valid JSON"),
        ('{"score": 1', "not valid JSON"),
        ('```{"why": "x"}```', '"score" is a required property'),
        ('{"score": -Infinity}', "score: null is not of type"),
        ('{"score": 1, "d": ' + "[" * 252 + "]" * 252 + "}", "more than 200 levels"),
        ('{"score": 1, "d": ' + "[" * 900 + "]" * 900 + "}", "more than 200 levels"),
        ("[" * 100_000, "."),
        ("```json\n" + "[" * 900 + "]" * 900 + "\n```", "more than 200 levels"),
    ],
)
def test_other_texts_are_invalid_answers(text: str, problem: str) -> None:
    with pytest.raises(InvalidAnswerError, match=problem):
        AnswerCheck(SCHEMA, 9).check_value(text)


def test_whole_json_is_not_searched_for_fences() -> None:
    assert list(parse_answer('"```json\\n1\\n```"')) == ["```json\n1\n```"]


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("stop", None),
        (None, None),
        ("eos_token", None),
        ("tool_calls", None),
        ("STOP", None),
        ("length", "cut"),
        ("MAX_TOKENS", "cut"),
        ("content_filter", "withheld"),
        ("SAFETY", "withheld"),
        ("repetition", "looped"),
    ],
)
def test_only_known_irregular_ends_count(reason: str | None, stop: str | None) -> None:
    assert classify_finish(reason) == stop


def reply(finish_reason: str | None, **more: Any) -> dict[str, Any]:
    return {"finish_reason": finish_reason, "refusal": None} | more


def test_an_unknown_end_is_ignored_and_a_cut_one_is_not() -> None:
    check = AnswerCheck(SCHEMA, 9)
    assert check.check_finish(GOOD, reply("end_turn")) == GOOD
    assert check.check_finish(GOOD, reply("repetition")) == GOOD  # whole if it is valid
    with pytest.raises(TruncatedAnswerError):
        check.check_finish(GOOD, reply("MAX_TOKENS"))


@pytest.mark.parametrize(
    ("content", "has_reasoning", "is_spent"),
    [
        ("", True, True),
        (" \n", True, True),
        ("<think>so", False, True),
        (" <THINK>\nso", False, True),
        ("", False, False),
        ("begun", True, False),
        ("begun", False, False),
        ("<think>so</think> begun", False, False),
    ],
)
def test_a_cut_answer_says_if_it_is_reasoning_only(
    content: str, has_reasoning: bool, is_spent: bool
) -> None:
    with pytest.raises(TruncatedAnswerError) as caught:
        AnswerCheck(None, 64).check_finish(content, reply("length"), has_reasoning=has_reasoning)
    assert caught.value.message.startswith("all tokens went into the model's reason") is is_spent


@pytest.mark.parametrize(
    ("used", "sent", "words"),
    [
        (64, 64, "cut at 64 tokens (model.max_tokens); raise it"),
        (None, None, "cut at 64 tokens (model.max_tokens); raise it"),
        (None, 40, "cut at 40 tokens, the most that the endpoint accepts (model.max_tokens is 64)"),
        (40, 40, "cut at 40 tokens, the most that the endpoint accepts (model.max_tokens is 64)"),
        (7, 64, "cut after 7 of the 64 tokens that were requested: the context of the model is"),
        (7, 40, "cut after 7 of the 40 tokens that were requested: the context of the model is"),
        (0, None, "cut after 0 of the 64 tokens"),
        (200, 128, "cut at 128 tokens (model.max_tokens); raise it"),
    ],
)
def test_a_cut_answer_says_what_cut_it(used: int | None, sent: int | None, words: str) -> None:
    with pytest.raises(TruncatedAnswerError, match=re.escape(words)):
        AnswerCheck(None, 64).check_finish(
            "begun", reply("length", completion_tokens=used, max_tokens=sent)
        )
