"""Generators of answers: schema, labels, agent, ESOL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Final, Protocol, TypeAlias

import orjson

from ..core.errors import ConfigurationError, MissingExtraError
from ..core.parsing import read_message_text
from .json_schema import follow_reference, merge_schemas
from .judging import answer_operator, measure_text, quote_text
from .requests import Question, SchemaCache
from .spec import SimulationSpec
from .values import (
    ApiError,
    SeededRandom,
    count_text_tokens,
    draw_normal,
    draw_prose,
    draw_uniform,
    hash_parts,
    truncate_tokens,
)

_SMILES: Final = re.compile(r"SMILES:[ \t]*(\S+)", re.IGNORECASE)
_QUOTES: Final = "`\"'"
_ENDS: Final = ".,;"
_MIDDLE: Final = -3.0  # log S at which the score is one half
_SPREAD: Final = 1.8  # standard deviation of log S among common molecules
_DRAWS: Final = tuple(NormalDist().inv_cdf((n + 0.5) / 40) for n in range(40))
"""Errors in standard deviations, all equally likely, by which a class is compared with others."""
_SPAN: Final = 6.0  # log S from "insoluble" to "very soluble", for scales of unknown names

_LEVELS: Final[Mapping[str, float]] = {
    "insoluble": -10.0,
    "poor": -6.0,
    "moderate": -4.0,
    "soluble": -2.0,
    "very": 0.0,
    "highly": math.inf,
}
"""Upper ends in log S of the usual scale, by the first word of the level."""
_THREE: Final[Mapping[str, float]] = {"poor": -4.0, "moderate": -2.0, "good": math.inf}
"""Upper ends of a scale of three levels."""


@dataclass(frozen=True, slots=True)
class Molecule:
    """Descriptors that ESOL uses.

    Attributes:
        clogp: Octanol-water partition, log10.
        mass: Molecular weight in g/mol.
        rotatable: Rotatable bonds.
        aromatic: Aromatic share of the heavy atoms.
    """

    clogp: float
    mass: float
    rotatable: int
    aromatic: float

    @property
    def log_s(self) -> float:
        """Solubility in water: log10 of mol/l."""
        heavy = 0.16 - 0.63 * self.clogp - 0.0062 * self.mass
        return heavy + 0.066 * self.rotatable - 0.74 * self.aromatic


class EsolResponder:
    """Answer questions about a molecule that the prompt names as ``SMILES: …``.

    The fields ``log_s``/``logS``, ``solubility_class``/``class``, ``score`` and
    ``reason``/``rationale`` are computed from the molecule; the others come from the fallback. The
    certainty of an answer is the probability of its class, given the error. A judge of molecules
    prefers soluble ones.

    Args:
        fallback: Draws the whole answer before the fields are set.
        noise: Standard deviation of the error, in log S.
        accuracy: Probability that the molecule is used at all.

    Raises:
        MissingExtraError: RDKit is not installed.
    """

    def __init__(self, fallback: Callable[[Question], str], noise: float, accuracy: float) -> None:
        self._fallback = fallback
        self._noise = noise
        self._accuracy = accuracy
        self._describe = _describer()

    def __call__(self, question: Question) -> str | GradedText:
        """Generate an answer; see `Responder`."""
        if (judged := answer_operator(question, self._measure, self._reason)) is not None:
            return dump_compact(judged)
        smiles = find_smiles(question.messages)
        molecule = self._describe(smiles)
        log_s = molecule.log_s + self._noise * draw_normal(question.key, "esol")
        schema = question.form.schema
        if draw_uniform(question.key, "accuracy") >= self._accuracy:
            return self._fallback(question)
        if schema is None:
            return _sentence(molecule, log_s)
        answer = orjson.loads(self._fallback(question))
        properties = _properties(schema.schema)
        if isinstance(answer, dict):
            answer.update(_fields(properties, molecule, log_s))
        if not schema.accepts(answer):
            raise ApiError(
                "The responder 'esol' cannot fill this JSON schema: its fields log_s, score, "
                "solubility_class or reason have bounds that the computed values break.",
                param="response_format",
            )
        certainty = _grade_class(properties, log_s, self._noise)
        text = dump_compact(answer)
        return text if certainty is None else GradedText(text, certainty)

    def _measure(self, text: str) -> float:
        smiles = _find_named(text)
        if smiles is None:
            return measure_text(text)
        return (self._describe(smiles).log_s - _MIDDLE) / _SPREAD

    def _reason(self, text: str) -> str:
        smiles = _find_named(text)
        if smiles is None:
            return quote_text(text)
        molecule = self._describe(smiles)
        return _sentence(molecule, molecule.log_s)


def _find_named(text: str) -> str | None:
    """Return the first ``SMILES:`` value of a text in JSON, or None."""
    try:
        found = _SMILES.search(str(orjson.loads(text)))
    except orjson.JSONDecodeError:
        return None
    return None if found is None else found[1].rstrip(_ENDS).strip(_QUOTES)


def find_smiles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the last ``SMILES:`` value of the first user message that has one.

    Raises:
        ApiError: No user message has one.
    """
    for message in messages:
        if message.get("role") == "user" and (found := _SMILES.findall(read_message_text(message))):
            return str(found[-1]).rstrip(_ENDS).strip(_QUOTES)
    raise ApiError(
        "The responder 'esol' answers prompts with 'SMILES: <molecule>'; this one has none. "
        "Use another responder.",
        param="messages",
    )


def _describer() -> Callable[[str], Molecule]:
    try:
        from rdkit import Chem, rdBase  # noqa: PLC0415 - an extra, needed here only
        from rdkit.Chem import rdMolDescriptors  # noqa: PLC0415 - as above
    except ImportError as error:
        raise MissingExtraError("the simulated responder 'esol'", "chem") from error

    def describe(smiles: str) -> Molecule:
        with rdBase.BlockLogs():
            mol = Chem.MolFromSmiles(smiles)
        if mol is None or not mol.GetNumHeavyAtoms():
            raise ApiError(f"RDKit cannot read the SMILES {smiles[:200]!r}.", param="messages")
        return Molecule(
            clogp=rdMolDescriptors.CalcCrippenDescriptors(mol)[0],
            mass=rdMolDescriptors._CalcMolWt(mol),  # noqa: SLF001 - Descriptors.MolWt, 0.2 s lighter
            rotatable=rdMolDescriptors.CalcNumRotatableBonds(mol),
            aromatic=len(mol.GetAromaticAtoms()) / mol.GetNumHeavyAtoms(),
        )

    return describe


def _properties(schema: Any) -> Mapping[str, Any]:
    """Return the schema's fields, with references resolved."""
    found = schema.get("properties", {}) if isinstance(schema, dict) else {}
    return {
        name: merge_schemas(
            follow_reference(schema, part["$ref"]), {k: v for k, v in part.items() if k != "$ref"}
        )
        if isinstance(part, dict) and "$ref" in part
        else part
        for name, part in found.items()
    }


def _fields(properties: Mapping[str, Any], molecule: Molecule, log_s: float) -> dict[str, Any]:
    """Return the fields of the schema that are computed from the molecule."""
    makers: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
        "log_s": lambda part: _within(part, round(log_s, 2)),
        "logS": lambda part: _within(part, round(log_s, 2)),
        "solubility_class": lambda part: _level(part, log_s),
        "class": lambda part: _level(part, log_s),
        "score": lambda part: _score(part, log_s),
        "reason": lambda part: _sentence(molecule, log_s)[: part.get("maxLength")],
        "rationale": lambda part: _sentence(molecule, log_s)[: part.get("maxLength")],
    }
    return {
        name: makers[name](part)
        for name, part in properties.items()
        if name in makers and isinstance(part, dict) and ("type" in part or "enum" in part)
    }


def _within(part: Mapping[str, Any], value: float) -> float:
    bounded: float = min(max(value, part.get("minimum", -math.inf)), part.get("maximum", math.inf))
    return round(bounded) if part.get("type") == "integer" else bounded


def _score(part: Mapping[str, Any], log_s: float) -> float:
    low, high = part.get("minimum", 0), part.get("maximum", 1)
    share = 1 / (1 + math.exp(_MIDDLE - log_s))
    return _within(part, round(low + (high - low) * share, 4))


def _level(part: Mapping[str, Any], log_s: float) -> Any:
    levels = part.get("enum")
    if not levels:
        return _name(log_s, list(_LEVELS), _LEVELS)
    for scale in (_THREE, _LEVELS):
        if all(_first(level) in scale for level in levels):
            return _name(log_s, levels, scale)
    position = (log_s + _SPAN) / _SPAN * len(levels)
    return levels[min(max(int(position), 0), len(levels) - 1)]


def _grade_class(properties: Mapping[str, Any], log_s: float, noise: float) -> float | None:
    """Return the probability of the class of an answer; None if it has no class."""
    parts = [properties[name] for name in ("solubility_class", "class") if name in properties]
    if not parts or not isinstance(parts[0], dict):
        return None
    chosen = _level(parts[0], log_s)
    same = sum(_level(parts[0], log_s + noise * draw) == chosen for draw in _DRAWS)
    return float(same) / len(_DRAWS)


def _name(log_s: float, levels: list[Any], scale: Mapping[str, float]) -> Any:
    rising = sorted(levels, key=lambda level: scale[_first(level)])
    return next((level for level in rising if log_s < scale[_first(level)]), rising[-1])


def _first(level: object) -> str:
    word = re.split(r"[\s_-]", str(level).lower())[0]
    return word.removesuffix("ly") if word not in _LEVELS else word


def _sentence(molecule: Molecule, log_s: float) -> str:
    level = _name(log_s, list(_THREE), _THREE)
    return (
        f"cLogP {molecule.clogp:.2f} and MW {molecule.mass:.1f} g/mol point to {level} "
        f"solubility in water (log S {log_s:.2f})."
    )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Answer of a model that chooses to call a function.

    Attributes:
        name: The function; one of ``question.tools``.
        arguments: Its arguments.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GradedText:
    """Answer of a model with the probability that it gives to each value in it.

    Attributes:
        text: The whole text.
        certainty: The probability.
    """

    text: str
    certainty: float


class Responder(Protocol):
    """Generator of the answer to one question."""

    def __call__(self, question: Question) -> str | ToolCall | GradedText:
        """Generate an answer.

        Args:
            question: The question; ``question.key`` seeds all random draws.

        Returns:
            The whole text (JSON if the form requires it), with a certainty if the responder has
            one, or a function call.

        Raises:
            ApiError: The question cannot be answered.
        """
        ...


class SchemaResponder:
    """Generate a value that conforms to the schema, or prose.

    Args:
        output_tokens: Minimum and maximum of tokens of prose.
    """

    def __init__(self, output_tokens: tuple[int, int]) -> None:
        self._output_tokens = output_tokens

    def __call__(self, question: Question) -> str:
        """Generate an answer; see `Responder`."""
        form, dice = question.form, SeededRandom(question.key)
        if form.schema is not None:
            if (answer := answer_operator(question)) is not None:
                return dump_compact(answer)
            return dump_compact(form.schema.draw(question.key))
        if form.choices:
            return form.choices[dice.below(len(form.choices))]
        if form.pattern is not None:
            return form.pattern(dice)
        return draw_prose(dice, dice.between(*self._output_tokens))


class LabelResponder:
    """Answer with a truth that all models share, and with errors of each model's own.

    The truth follows from messages and schema alone. Questions differ in difficulty: the share of
    right answers falls from 1 for the easiest one so far that its mean is the accuracy. That share
    is the certainty of the answer.

    Args:
        fallback: Answers questions without a schema.
        accuracy: Share of right answers.
    """

    def __init__(self, fallback: SchemaResponder, accuracy: float) -> None:
        self._fallback = fallback
        self._accuracy = accuracy

    def __call__(self, question: Question) -> str | GradedText:
        """Generate an answer; see `Responder`."""
        schema = question.form.schema
        if schema is None or answer_operator(question) is not None:
            return self._fallback(question)
        truth = hash_parts("truth", orjson.dumps([question.messages, schema.schema]))
        certainty = max(0.0, 1 - 2 * (1 - self._accuracy) * draw_uniform(truth, "difficulty"))
        is_right = draw_uniform(question.key, "right") < certainty
        drawn = schema.draw(truth if is_right else hash_parts(question.key, "wrong"))
        return GradedText(dump_compact(drawn), certainty)


ResponderFactory: TypeAlias = Callable[[SimulationSpec], Responder]


def _esol(spec: SimulationSpec) -> Responder:
    return EsolResponder(SchemaResponder(spec.output_tokens), spec.noise, spec.accuracy)


def _label(spec: SimulationSpec) -> Responder:
    return LabelResponder(SchemaResponder(spec.output_tokens), spec.accuracy)


class AgentResponder:
    """Call each offered function once, in their order, and then answer.

    Arguments are drawn at random; those named ``smiles`` are the molecule of the conversation.

    Args:
        fallback: Generates the final answer, and draws what a form requires.
    """

    def __init__(self, fallback: SchemaResponder) -> None:
        self._fallback = fallback
        self._schemas = SchemaCache()

    def __call__(self, question: Question) -> str | ToolCall:
        """Generate an answer, or call the next function; see `Responder`."""
        used = _called_functions(question.messages)
        left = [tool for tool in question.tools if tool.get("name") not in used]
        if not left and question.form.tool is not None:
            left = [question.tools[-1]]  # a call is required, and the last one often ends a task
        if not left:
            return self._fallback(question)
        schema = left[0].get("parameters") or {"type": "object"}
        arguments = self._schemas.get(schema).draw(question.key)
        if "smiles" in arguments:
            arguments["smiles"] = find_smiles(question.messages)
        return ToolCall(str(left[0].get("name")), arguments)


def _called_functions(messages: list[dict[str, Any]]) -> set[str]:
    """Return the functions called since the last user message."""
    used = set[str]()
    for message in messages:
        if message.get("role") == "user":
            used.clear()
        for call in message.get("tool_calls") or ():
            used.add(str(call.get("function", {}).get("name")))
    return used


RESPONDERS: Final[Mapping[str, ResponderFactory]] = {
    "schema": lambda spec: SchemaResponder(spec.output_tokens),
    "labels": _label,
    "esol": _esol,
    "agent": lambda spec: AgentResponder(SchemaResponder(spec.output_tokens)),
}
"""Responders of fanfold; `SimulatedFleet` accepts others as well."""


def make_responder(
    spec: SimulationSpec, responders: Mapping[str, ResponderFactory] = RESPONDERS
) -> Responder:
    """Return the responder that a specification names.

    Args:
        spec: The fleet's specification.
        responders: Factories by name.

    Raises:
        ConfigurationError: The name is unknown.
        MissingExtraError: The responder's packages are not installed.
    """
    factory = responders.get(spec.responder)
    if factory is None:
        raise ConfigurationError(
            f"simulated fleet: responder {spec.responder!r} is unknown; "
            f"available: {', '.join(sorted(responders))}"
        )
    return factory(spec)


def dump_compact(value: Any) -> str:
    """Return a value as JSON without spaces."""
    return orjson.dumps(value).decode()


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of a node.

    Attributes:
        text: The content, or a tool call's arguments.
        finish_reason: ``stop``, ``length``, ``tool_calls``, ``content_filter`` or ``abort``.
        tokens: Output tokens, those of a tool call included.
        tool: Name of the called function, or None.
        refusal: The model's refusal, or None.
        logprobs: The tokens of the text with their log probabilities, or None.
    """

    text: str
    finish_reason: str
    tokens: int
    tool: str | None = None
    refusal: str | None = None
    logprobs: tuple[tuple[str, float], ...] | None = None


def answer_question(question: Question, responder: Responder) -> Answer:
    """Return the answer to a question, cut at stop texts and at the token limit.

    Raises:
        ApiError: The question cannot be answered.
    """
    reply = responder(question)
    if not isinstance(reply, ToolCall):
        if isinstance(reply, str):
            reply = GradedText(reply, draw_uniform(question.key, "certainty"))
        answer = limit_answer(question, reply.text)
        if question.logprobs:
            answer = replace(answer, logprobs=tuple(grade_tokens(answer.text, reply.certainty)))
        return answer
    if reply.name not in {tool.get("name") for tool in question.tools}:
        raise ApiError(f"the responder calls {reply.name!r}, which is not a function of tools")
    return limit_answer(question, dump_compact(reply.arguments), reply.name)


def limit_answer(question: Question, text: str, tool: str | None = None) -> Answer:
    """Cut a text as a server does.

    Args:
        question: The question, with its limits.
        text: The whole text.
        tool: The called function, unless the question itself names one.

    Returns:
        The answer; a truncated tool call becomes plain text, as in vLLM.
    """
    ends = [position for stop in question.stop if stop and (position := text.find(stop)) >= 0]
    whole = text[: min(ends)] if ends else text
    tokens = count_text_tokens(whole)
    tool = tool or question.form.tool
    if tokens <= question.max_tokens:
        return Answer(whole, "tool_calls" if tool else "stop", tokens, tool)
    if tool:
        whole = f'<tool_call>\n{{"name": "{tool}", "arguments": {whole}'
    return Answer(truncate_tokens(whole, question.max_tokens), "length", question.max_tokens)


_VALUE_START: Final = re.compile(r'(?:^|[:\[])"?-?$')
"""The end of compact JSON text after which a value begins."""
_BEFORE: Final = 3
"""Characters that it takes at most."""


def grade_tokens(text: str, certainty: float) -> Iterator[tuple[str, float]]:
    """Yield the tokens of a text with their log probabilities.

    The first token of each value in JSON has the certainty, all others are nearly sure.

    Args:
        text: The text.
        certainty: Probability of a value.
    """
    at, value = 0, math.log(max(certainty, 1e-9))
    while at < len(text):
        token = truncate_tokens(text[at:], 1)
        starts = (at + n for n, char in enumerate(token) if char.isalnum())
        begins = any(_VALUE_START.search(text[max(0, n - _BEFORE) : n]) for n in starts)
        yield token, value if begins else -1e-6
        at += len(token)


def spoil_answer(answer: Answer, kind: str, question: Question) -> Answer:
    """Spoil an answer according to a fault.

    Args:
        answer: The correct answer.
        kind: ``empty_content``, ``content_filter``, ``refusal`` or ``bad_schema``; other faults
            do not change the answer.
        question: The question.
    """
    match kind:
        case "empty_content":
            return replace(answer, text="", tokens=0, tool=None, finish_reason="stop")
        case "content_filter":
            return replace(answer, finish_reason="content_filter")
        case "refusal":
            refusal = "I'm sorry, but I can't help with that."
            tokens = count_text_tokens(refusal)
            return replace(answer, text="", refusal=refusal, tokens=tokens, finish_reason="stop")
        case "bad_schema":
            return limit_answer(question, _invalid_answer(question))
        case _:
            return answer


def halve_answer(answer: Answer) -> Answer:
    """Return the first half of an answer, marked ``abort``, as from a node during shutdown."""
    tokens = answer.tokens // 2
    return Answer(truncate_tokens(answer.text, tokens), "abort", tokens)


def _invalid_answer(question: Question) -> str:
    schema = question.form.schema
    if schema is None:
        return '{"answer": '
    value: Any = schema.draw_invalid(hash_parts(question.key, "broken"))
    return dump_compact(value)
