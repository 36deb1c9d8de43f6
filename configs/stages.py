"""Section ``stages``: the steps of a pipeline, and the settings of each as a run."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .aggregators import AnyAggregatorConfig
from .base import Access, Section, declare_access
from .operators import AnyOperatorConfig, CascadeConfig, OperatorConfig

STAGE_NAME: Final = r"^[a-z][a-z0-9_]{0,31}$"

STAGED_PROMPT: Final = "{stages}"
"""``task.prompt`` of settings with stages, each of which has a prompt of its own."""

_RESERVED: Final = frozenset({"input", "output", "id"})
"""Names that mean something else where a column is named."""


class StageBudgetConfig(Section):
    """Limits of one stage, within the budget of the pipeline; None means no limit of its own.

    Attributes:
        usd: US dollars.
        tokens: Prompt and completion tokens.
        requests: Requests sent, including failed ones.
        node_hours: Hours times nodes.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="usd tokens requests node_hours")

    usd: Annotated[float, Field(gt=0, le=9_000_000)] | None = None
    tokens: Annotated[int, Field(gt=0, le=2**53)] | None = None
    requests: Annotated[int, Field(gt=0, le=2**53)] | None = None
    node_hours: Annotated[float, Field(gt=0, le=1_000_000_000)] | None = None


def _get_kind(value: Any) -> str:
    """Return what ``reduce`` of a stage is: aggregators are a list."""
    return "aggregators" if isinstance(value, list) else "operator"


AnyReduce = Annotated[
    Annotated[AnyOperatorConfig, Tag("operator")]
    | Annotated[list[AnyAggregatorConfig], Tag("aggregators")],
    Discriminator(_get_kind),
]


class StageConfig(Section):
    """One stage of a pipeline: it asks about each item (``map``), or reduces all (``reduce``).

    Attributes:
        name: Its name: small letters, digits and _, a letter first.
        source: (key ``from``) The stage whose results are its items; None: the previous stage, and
            the input for the first.
        where: Conditions that select results of that stage: ``output.score > 0.8``.
        join: ``id`` adds the answers of earlier stages about items with the same id.
        map: A task: prompt, schema, system and so on; top-level ``task`` has the defaults.
        reduce: An operator, a mapping with ``op`` (summarize, rank, extract or dedup); or,
            beside ``map``, a list of aggregators.
        cascade: Beside ``map``: a small model answers all items, and the model of the stage those
            that are uncertain.
        model: Changes to the top-level ``model``.
        endpoints: Endpoints in place of the top-level ones.
        limits: Changes to the top-level ``limits``.
        budget: Limits of the stage, within the budget of the pipeline.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="name from where join map reduce cascade model endpoints limits budget",
    )

    name: Annotated[str, Field(pattern=STAGE_NAME)]
    source: Annotated[str | None, Field(alias="from")] = None
    where: Annotated[str, Field(min_length=1)] | None = None
    join: Literal["id"] | None = None
    map: dict[str, Any] | None = None
    reduce: AnyReduce | None = None
    cascade: CascadeConfig | None = None
    model: dict[str, Any] | None = None
    endpoints: dict[str, Any] | Literal["auto"] | None = None
    limits: dict[str, Any] | None = None
    budget: StageBudgetConfig | None = None

    @field_validator("name")
    @classmethod
    def _is_no_source(cls, value: str) -> str:
        if value in _RESERVED:
            raise ValueError(f"{value!r} already means something else; choose another name")
        return value

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if self.map is None and not isinstance(self.reduce, OperatorConfig):
            msg = f"stage {self.name!r} has nothing to do; give map: a task, or reduce: {{op: …}}"
            raise ValueError(msg)
        if self.map is not None and isinstance(self.reduce, OperatorConfig):
            msg = (
                f"stage {self.name!r} has both map and the operator {self.reduce.op}; make it two "
                "stages, or give reduce a list of aggregators"
            )
            raise ValueError(msg)
        if self.cascade is not None and (self.map is None or self.reduce):
            msg = (
                f"stage {self.name!r}: cascade needs map beside it, and no reduce; aggregate its "
                "answers in a later stage"
            )
            raise ValueError(msg)
        return self

    @property
    def operator(self) -> AnyOperatorConfig | CascadeConfig | None:
        """Return the operator of the stage, or None if one model answers each item."""
        if self.cascade is not None:
            return self.cascade
        return self.reduce if isinstance(self.reduce, OperatorConfig) else None

    @property
    def reduces(self) -> bool:
        """Return True if the stage has an operator that reduces its items."""
        return isinstance(self.reduce, OperatorConfig)


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Check names and order of stages.

    Raises:
        ValueError: A name occurs twice, or ``from`` names no earlier stage.
    """
    known = list[str]()
    for stage in stages:
        if stage.name in known:
            added = ""
            if stage.name == MERGED_STAGE:
                added = "; input.split.merge adds a stage of this name: rename yours"
            raise ValueError(f"stages: the name {stage.name!r} occurs twice{added}")
        if stage.source is not None and stage.source not in known:
            earlier = ", ".join(known) or "none"
            msg = (
                f"stages: {stage.name!r} has from: {stage.source!r}, which is not an earlier stage "
                f"(there are {earlier})"
            )
            raise ValueError(msg)
        if not known and (stage.where is not None or stage.join is not None):
            msg = (
                f"stages: the first stage {stage.name!r} reads the input, where where and join "
                "have no meaning; leave them out"
            )
            raise ValueError(msg)
        known.append(stage.name)


def find_source(stages: Sequence[StageConfig], number: int) -> str | None:
    """Return the name of the stage whose results are the items of a stage; None for the input."""
    if number == 0:
        return None
    return stages[number].source or stages[number - 1].name


def make_stage_settings(data: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the settings of a stage as those of a run.

    Args:
        data: The settings of the pipeline, unexpanded.
        number: The stage, from 0.
    """
    settings = copy.deepcopy(dict(data))
    stage = settings.pop("stages")[number]
    task = dict(settings.pop("task", None) or {})
    if task.get("prompt") == STAGED_PROMPT:
        del task["prompt"]
    settings["task"] = task | (stage.get("map") or {"prompt": STAGED_PROMPT, "messages": None})
    if stage.get("map", None) and stage["map"].get("messages") is not None:
        settings["task"] |= {"prompt": "", "system": stage["map"].get("system", "")}
    elif stage.get("map", None) and stage["map"].get("prompt"):
        settings["task"]["messages"] = None
    for section in ("model", "limits"):
        if changes := stage.get(section):
            settings[section] = {**(settings.get(section) or {}), **changes}
    if stage.get("endpoints") is not None:
        settings["endpoints"] = stage["endpoints"]
    found = stage.get("reduce")
    settings["reduce"] = found if isinstance(found, list) else []
    settings["name"] = f"{settings.get('name', 'run')}-{stage['name']}"[:64]
    if number:
        settings["input"] = keep_split(settings.get("input"))
    settings.pop("batch", None)
    return settings


def keep_split(given: Any) -> dict[str, Any]:
    """Return the section ``input`` of a later stage, whose items may be parts of documents."""
    split = given.get("split") if isinstance(given, dict) else None
    return {"split": split} if isinstance(split, dict) else {}


MERGED_STAGE: Final = "documents"
"""Name of the stage that ``input.split.merge`` adds."""
_SUMMARIZE: Final = "Summarize what these answers say about the document."


def expand_merge(data: dict[str, Any]) -> None:
    """Replace ``input.split.merge`` by a stage that merges the answers, in place.

    A single task becomes the stage ``parts``. Settings that are not as they should be are left for
    the check that follows.
    """
    given = data.get("input")
    split = given.get("split") if isinstance(given, dict) else None
    how = split.get("merge") if isinstance(split, dict) else None
    if not isinstance(split, dict) or how not in ("concat", "vote", "summarize"):
        return
    stages = data.get("stages")
    if stages is None:
        first: Any = {"name": "parts", "map": data.pop("task", None)}
        if aggregators := data.pop("reduce", None):
            first["reduce"] = aggregators
        stages = [first]
    first = stages[0] if isinstance(stages, list) and stages else None
    if not isinstance(first, dict) or not isinstance(first.get("map"), dict):
        return
    name = str(first.get("name"))
    reduce: dict[str, Any] = {"op": "merge", "field": name, "how": how}
    reduce["text"] = split.get("column", "text")
    if how == "summarize":
        reduce = {"op": "summarize", "prompt": _SUMMARIZE, "text": f"{{{name}}}"}
        reduce["group_by"] = "part.document"
    merged = {"name": MERGED_STAGE, "from": name, "reduce": reduce}
    split["merge"] = None
    data["stages"] = [first, merged, *stages[1:]]
