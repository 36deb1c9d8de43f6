from __future__ import annotations

import math
import statistics
import sys
from dataclasses import replace
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import MissingExtraError
from fanfold.backends.simulated.requests import Question, QuestionReader
from fanfold.backends.simulated.responders import (
    Answer,
    GradedText,
    SchemaResponder,
    answer_question,
    grade_tokens,
    halve_answer,
    limit_answer,
    make_responder,
    spoil_answer,
)
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import ApiError
from fanfold.nodes.item.certainty import read_certainty

ASK = {"role": "user", "content": "What?"}
LENGTH = 1000


def read(chat: bool = True, **body: Any) -> Question:
    data = {"messages": [ASK], **body} if chat else body
    return QuestionReader("m", 0).read(orjson.dumps(data), chat, LENGTH)


def schema_form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def say(question: Question) -> Answer:
    return answer_question(question, SchemaResponder((20, 30)))


def test_the_key_is_what_is_asked_and_nothing_else() -> None:
    key = read().key
    assert read(max_tokens=5, temperature=0, stream=True, user="me").key == key
    others = [
        read(seed=1),
        read(messages=[{**ASK, "content": "Why?"}]),
        read(messages=[ASK, {"role": "assistant", "content": "{"}, ASK]),
        read(response_format={"type": "json_object"}),
        QuestionReader("m", 1).read(orjson.dumps({"messages": [ASK]}), True, LENGTH),
    ]
    assert len({key, *(other.key for other in others)}) == 6
    assert read(messages=[dict(reversed(ASK.items()))]).key == key


def test_limits() -> None:
    prompt = read().prompt_tokens
    assert read().max_tokens == LENGTH - prompt
    assert read(max_tokens=7).max_tokens == 7
    assert read(max_tokens=7, max_completion_tokens=9).max_tokens == 9
    assert read(max_tokens=LENGTH).max_tokens == LENGTH - prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 2}, "n"),
        ({"max_tokens": LENGTH + 1}, "max_tokens"),
        ({"max_completion_tokens": LENGTH + 1}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": 5}, None),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "input_tokens"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": schema_form({"not": {}})}, "response_format"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_refusals(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_unknown_model() -> None:
    with pytest.raises(ApiError) as caught:
        read(model="other")
    assert (caught.value.status, caught.value.kind) == (404, "NotFoundError")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_no_object(body: bytes) -> None:
    with pytest.raises(ApiError):
        QuestionReader("m", 0).read(body, True, LENGTH)


def test_prompts_of_bare_completions() -> None:
    assert read(chat=False, prompt="abcd").prompt_tokens == 1
    assert read(chat=False, prompt=["abcd"]).messages == [{"role": "user", "content": "abcd"}]
    with pytest.raises(ApiError):
        read(chat=False, prompt=["a", "b"])


def test_forms() -> None:
    assert say(read(structured_outputs={"choice": ["yes", "no"]})).text in {"yes", "no"}
    assert say(read(structured_outputs={"regex": "ab{2}"})).text == "abb"
    assert say(read(structured_outputs={"json": '{"const": 4}'})).text == "4"
    assert "answer" in orjson.loads(say(read(structured_outputs={"json_object": True})).text)
    assert "answer" in orjson.loads(say(read(response_format={"type": "json_object"})).text)
    assert 20 <= say(read()).tokens <= 30
    assert say(read(guided_json={"const": 4})).text != "4"


def test_tools() -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"const": 4}}},
        {"type": "function", "function": {"name": "g"}},
    ]
    named = {"type": "function", "function": {"name": "g"}}
    first, second = (
        say(read(tools=tools, tool_choice="required")),
        say(read(tools=tools, tool_choice=named)),
    )
    assert (first.tool, first.text, first.finish_reason) == ("f", "4", "tool_calls")
    assert (second.tool, second.text) == ("g", "{}")
    assert say(read(tools=tools)).tool is None
    cut = limit_answer(read(tools=tools, tool_choice="required", max_tokens=2), "[1,2,3,4]")
    assert (cut.tool, cut.text, cut.finish_reason) == (None, "<tool_ca", "length")


def test_stop_texts_and_length() -> None:
    assert limit_answer(read(stop="c"), "abcd").text == "ab"
    assert limit_answer(read(stop=["d", "b", ""]), "abcd").text == "a"
    long = limit_answer(read(max_tokens=2), "0123456789")
    assert long == Answer("01234567", "length", 2)
    assert halve_answer(Answer("0123456789ab", "stop", 3)) == Answer("0123", "abort", 1)


def test_spoiled_answers() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    question = read(response_format=schema_form(schema))
    answer = say(question)
    assert spoil_answer(answer, "empty_content", question).text == ""
    assert spoil_answer(answer, "content_filter", question).finish_reason == "content_filter"
    assert spoil_answer(answer, "refusal", question).refusal
    assert orjson.loads(spoil_answer(answer, "bad_schema", question).text) == {}
    assert spoil_answer(answer, "bad_schema", read()).text == '{"answer": '
    assert spoil_answer(answer, "malformed", question) is answer


PROPERTIES = {
    "log_s": {"type": "number"},
    "logS": {"type": "integer", "minimum": -20},
    "solubility_class": {"enum": ["poor", "moderate", "good"]},
    "score": {"type": "number", "minimum": 0, "maximum": 1},
    "reason": {"type": "string", "maxLength": 40},
    "confidence": {"type": "number", "minimum": 0, "maximum": 1},
}


def esol(smiles: str, properties: dict[str, Any] = PROPERTIES, **spec: Any) -> dict[str, Any]:
    pytest.importorskip("rdkit")
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    question = read(
        messages=[{"role": "user", "content": f"Example.\nSMILES: {smiles}\nAnswer."}],
        response_format=schema_form(schema),
    )
    responder = make_responder(SimulationSpec(responder="esol", **spec))
    reply = responder(question)
    answer = orjson.loads(reply.text if isinstance(reply, GradedText) else str(reply))
    assert isinstance(answer, dict)
    return answer


def test_esol_is_delaneys_equation() -> None:
    # toluene: Crippen logP 1.995, MW 92.14, no rotatable bond, 6 of 7 heavy atoms aromatic
    expected = 0.16 - 0.63 * 1.995 - 0.0062 * 92.14 - 0.74 * 6 / 7
    answer = esol("Cc1ccccc1", noise=0.0)
    assert answer["log_s"] == pytest.approx(expected, abs=0.01)
    assert answer["logS"] == round(answer["log_s"])
    assert answer["solubility_class"] == "moderate"
    assert 0 < answer["score"] < 1
    assert answer["reason"].startswith("cLogP 1.99") or "cLogP 2.00" in answer["reason"]
    assert len(answer["reason"]) == 40


def test_esol_fills_fields_that_refer() -> None:
    properties = {
        "class": {"$ref": "#/properties/kept", "title": "Class"},
        "kept": {"enum": ["a", "b"]},
    }
    assert esol("OCC1OC(O)C(O)C(O)C1O", properties)["class"] == "b"
    assert esol("CCCCCCCCCCCCCCCCCC", properties)["class"] == "a"


def test_esol_ranks_sugar_above_fat() -> None:
    sugar = esol("OCC1OC(O)C(O)C(O)C1O")
    fat = esol("CCCCCCCCCCCCCCCCCC")
    assert sugar["score"] > fat["score"]
    assert (sugar["solubility_class"], fat["solubility_class"]) == ("good", "poor")


def test_esol_noise_is_seeded() -> None:
    assert esol("CCO", noise=0.3) == esol("CCO", noise=0.3)
    drawn = [
        esol("C" * n, noise=0.3)["log_s"] - esol("C" * n, noise=0.0)["log_s"] for n in range(1, 41)
    ]
    assert 0.15 < statistics.pstdev(drawn) < 0.45


def test_esol_without_accuracy_knows_nothing() -> None:
    assert esol("CCO", accuracy=0.0)["log_s"] != esol("CCO", noise=0.0)["log_s"]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (
            ["insoluble", "poorly soluble", "moderately soluble", "soluble", "very soluble"],
            "soluble",
        ),
        (["good", "moderate", "poor"], "moderate"),
        (["low", "mid", "high"], "mid"),
    ],
)
def test_esol_maps_levels_by_name_or_order(levels: list[str], expected: str) -> None:
    assert esol("Cc1ccccc1", {"class": {"enum": levels}}, noise=0.0)["class"] == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [("SMILES: C((", "cannot read"), ("no molecule", "SMILES: <molecule>"), ("SMILES: []", "read")],
)
def test_esol_says_what_it_cannot_read(content: str, words: str) -> None:
    pytest.importorskip("rdkit")
    responder = make_responder(SimulationSpec(responder="esol"))
    with pytest.raises(ApiError, match=words):
        responder(read(messages=[{"role": "user", "content": content}]))


def test_esol_is_less_certain_near_the_bound_of_a_class() -> None:
    pytest.importorskip("rdkit")
    responder = make_responder(SimulationSpec(responder="esol"))
    form = schema_form(
        {"type": "object", "properties": {"class": {"enum": ["poor", "moderate", "good"]}}}
    )
    graded = dict[str, float]()
    for smiles in ("OCC1OC(O)C(O)C(O)C1O", "CCCCCCCCCCCCCCCCCC", "c1ccccc1"):
        reply = responder(
            read(messages=[{"role": "user", "content": f"SMILES: {smiles}"}], response_format=form)
        )
        assert isinstance(reply, GradedText)
        graded[smiles] = reply.certainty
    assert graded.pop("c1ccccc1") < 0.95 < min(graded.values())


def test_esol_judges_by_solubility() -> None:
    pytest.importorskip("rdkit")
    responder = make_responder(SimulationSpec(responder="esol"))
    texts = [
        "SMILES: CCCCCCCCCCCCCCCCCC",
        "SMILES: OCC1OC(O)C(O)C(O)C1O (log S 1)",
        "SMILES: CCCCCC",
    ]
    shown = "\n".join(
        f"{letter}: {orjson.dumps(text).decode()}"
        for letter, text in zip("ABC", texts, strict=True)
    )
    order = {"type": "array", "items": {"enum": list("ABC")}}
    form = schema_form({"type": "object", "properties": {"order": order}})
    asked = read(messages=[{"role": "user", "content": shown}], response_format=form)
    assert orjson.loads(str(responder(asked)))["order"] == list("BCA")


def test_esol_talks_without_a_schema() -> None:
    pytest.importorskip("rdkit")
    responder = make_responder(SimulationSpec(responder="esol"))
    question = read(messages=[{"role": "user", "content": "smiles:\t`CCO`."}])
    assert "MW 46.1" in str(responder(question))
    assert replace(question).first_round


def test_esol_refuses_a_schema_that_it_cannot_fill() -> None:
    with pytest.raises(ApiError, match="cannot fill"):
        esol("CCO", {"log_s": {"type": "number", "multipleOf": 7}})


def test_esol_without_rdkit_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingExtraError, match=r"fanfold\[chem\]"):
        make_responder(SimulationSpec(responder="esol"))


LABELS = {"type": "object", "required": ["label"], "properties": {"label": {"enum": list("abcd")}}}


def label(text: str, model: str, **spec: Any) -> Answer:
    body = {
        "messages": [{"role": "user", "content": text}],
        "response_format": schema_form(LABELS),
        "logprobs": True,
    }
    question = QuestionReader(model, 0).read(orjson.dumps(body), chat=True, max_model_len=LENGTH)
    return answer_question(question, make_responder(SimulationSpec(responder="labels", **spec)))


def test_models_share_a_truth_and_err_on_their_own() -> None:
    texts = [f"text {n}" for n in range(300)]
    truth = [label(text, "large").text for text in texts]
    assert [label(text, "huge").text for text in texts] == truth
    small = [label(text, "small", accuracy=0.6) for text in texts]
    other = [label(text, "other", accuracy=0.6) for text in texts]
    assert [one.text for one in small] != [one.text for one in other]
    right = [a.text == b for a, b in zip(small, truth, strict=True)]
    assert 0.6 < statistics.mean(right) < 0.8  # an error may hit the truth
    sure = [read_certainty(one.text, shown(one), ("label",)) or 0.0 for one in small]
    ranked = [one for _, one in sorted(zip(sure, right, strict=True))]
    assert statistics.mean(ranked[150:]) > statistics.mean(ranked[:150]) + 0.1


def shown(answer: Answer) -> dict[str, Any]:
    return {"content": [{"token": one, "logprob": two} for one, two in answer.logprobs or ()]}


@pytest.mark.parametrize("text", ['{"a":"b","c":[1,-2.5,true],"é":"ü x"}', "a free text", "-1.5"])
def test_tokens_with_log_probabilities_are_the_text(text: str) -> None:
    tokens = list(grade_tokens(text, 0.5))
    assert "".join(token for token, _ in tokens) == text
    assert min(value for _, value in tokens) == pytest.approx(math.log(0.5))
