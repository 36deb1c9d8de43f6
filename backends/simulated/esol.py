"""The ``esol`` responder: aqueous solubility from a molecule's descriptors.

Delaney's ESOL (J. S. Delaney, J. Chem. Inf. Comput. Sci. 2004, 44, 1000-1005,
doi:10.1021/ci034243x)::

    log S = 0.16 - 0.63 cLogP - 0.0062 MW + 0.066 RB - 0.74 AP

with S in mol/l, MW in g/mol, RB the rotatable bonds and AP the aromatic share of the heavy
atoms. Here cLogP is RDKit's Crippen estimate, where Delaney used Daylight's; the answer is a
demonstration with plausible numbers, not a prediction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ..core.errors import MissingExtraError
from .dice import chance, normal
from .errors import ApiError
from .merging import merge, resolve
from .requests import Question
from .tokens import message_text

_SMILES: Final = re.compile(r"SMILES:[ \t]*(\S+)", re.IGNORECASE)
_QUOTES: Final = "`\"'"
_ENDS: Final = ".,;"
_MIDDLE: Final = -3.0  # log S at which the score is one half
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
"""The same for a scale of three."""


@dataclass(frozen=True, slots=True)
class Molecule:
    """The descriptors that ESOL takes.

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
    """Answers questions about a molecule that the prompt names as ``SMILES: …``.

    Of the answer's fields, ``log_s``/``logS``, ``solubility_class``/``class``, ``score`` and
    ``reason``/``rationale`` follow from the molecule; the others are the fallback's.

    Args:
        fallback: Draws the whole answer before the fields are set.
        noise: Standard deviation of the error, in log S.
        accuracy: Probability that the molecule is looked at, at all.

    Raises:
        MissingExtraError: RDKit is not installed.
    """

    def __init__(self, fallback: Callable[[Question], str], noise: float, accuracy: float) -> None:
        self._fallback = fallback
        self._noise = noise
        self._accuracy = accuracy
        self._describe = _describer()

    def __call__(self, question: Question) -> str:
        """Write an answer; see `responders.Responder`."""
        smiles = find_smiles(question.messages)
        molecule = self._describe(smiles)
        log_s = molecule.log_s + self._noise * normal(question.key, "esol")
        schema = question.form.schema
        if chance(question.key, "accuracy") >= self._accuracy:
            return self._fallback(question)
        if schema is None:
            return _sentence(molecule, log_s)
        answer = orjson.loads(self._fallback(question))
        if isinstance(answer, dict):
            answer.update(_fields(_properties(schema.schema), molecule, log_s))
        if not schema.accepts(answer):
            raise ApiError(
                "The responder 'esol' cannot fill this JSON schema: its fields log_s, score, "
                "solubility_class or reason have bounds that the computed values break.",
                param="response_format",
            )
        return orjson.dumps(answer).decode()


def find_smiles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Find the molecule that a conversation is about.

    Args:
        messages: The conversation.

    Returns:
        What follows the last ``SMILES:`` of the first user message that has one.

    Raises:
        ApiError: No user message has one.
    """
    for message in messages:
        if message.get("role") == "user" and (
            found := _SMILES.findall(message_text(dict(message)))
        ):
            return str(found[-1]).rstrip(_ENDS).strip(_QUOTES)
    raise ApiError(
        "The responder 'esol' answers prompts that hold 'SMILES: <molecule>'; this one does not. "
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
    """Return the schema's fields, with what they refer to."""
    found = schema.get("properties", {}) if isinstance(schema, dict) else {}
    return {
        name: merge(resolve(schema, part["$ref"]), {k: v for k, v in part.items() if k != "$ref"})
        if isinstance(part, dict) and "$ref" in part
        else part
        for name, part in found.items()
    }


def _fields(properties: Mapping[str, Any], molecule: Molecule, log_s: float) -> dict[str, Any]:
    """Return the fields that follow from the molecule, as far as the schema has them."""
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
    place = (log_s + _SPAN) / _SPAN * len(levels)
    return levels[min(max(int(place), 0), len(levels) - 1)]


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
