"""Operators: entries of ``reduce`` that ask the model, and ``cascade``, in stages."""

from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args

from pydantic import BaseModel, Field, model_validator

from .base import Access, Section, declare_access


class OperatorConfig(Section):
    """Base of the settings of an operator; ``op`` names its kind.

    Requests never set them: a stage is closed to requests as a whole.
    """

    access: ClassVar[dict[str, Access]] = {}


class SummarizeConfig(OperatorConfig):
    """One summary of all items, or of each group of them, by a tree of summaries.

    Attributes:
        op: ``summarize``.
        prompt: What the summary is for; it precedes the texts, and needs no columns.
        text: Text of one item, with its columns in braces; None: the columns as JSON.
        group_by: Column whose values get a summary each; None: one summary of all.
        group_tokens: Most tokens of the texts of one group; None: what the model's context leaves,
            at most 6,000.
        statements: Most statements of one summary.
        verify: How many pairs of a statement and an item that it cites a judge checks at the end.
        system: Constant text, sent first.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op prompt text group_by group_tokens statements verify system",
    )

    op: Literal["summarize"]
    prompt: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)] | None = None
    group_by: str | None = None
    group_tokens: Annotated[int, Field(ge=100, le=10_000_000)] | None = None
    statements: Annotated[int, Field(ge=1, le=100)] = 10
    verify: Annotated[int, Field(ge=0, le=10_000)] = 0
    system: str = ""


class RankConfig(OperatorConfig):
    """The best ``k`` items by a criterion, judged by the model in groups.

    Attributes:
        op: ``rank``.
        prompt: The criterion; it precedes the texts, and needs no columns.
        k: How many of the best items are ranked.
        text: Text of one item, with its columns in braces; None: the columns as JSON.
        group: Items that the model compares in one call; fewer if they do not fit its context.
        repeats: Times that neighbours among the first ranks are compared.
        reasons: Ask for a reason for each of the best items.
        seed: Decides which items meet, and in which order they are shown.
        system: Constant text, sent first.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op prompt k text group repeats reasons seed system",
    )

    op: Literal["rank"]
    prompt: Annotated[str, Field(min_length=1)]
    k: Annotated[int, Field(ge=1, le=200)] = 10
    text: Annotated[str, Field(min_length=1)] | None = None
    group: Annotated[int, Field(ge=2, le=20)] = 10
    repeats: Annotated[int, Field(ge=1, le=20)] = 1
    reasons: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    system: str = ""


class SmallModelConfig(Section):
    """The small model of a cascade.

    Attributes:
        model: Its section ``model``; what is missing has the value of the stage, but for name and
            price.
        endpoints: The endpoints that serve it; None: those of the stage.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="model endpoints")

    model: dict[str, Any] = Field(default_factory=dict)
    endpoints: dict[str, Any] | Literal["auto"] | None = None

    @model_validator(mode="after")
    def _is_another_model(self) -> Self:
        if not self.model.get("name") and self.endpoints is None:
            raise ValueError("give model.name, or the endpoints that serve the small model")
        return self


class CascadeConfig(OperatorConfig):
    """A small model answers all items, and the model of the stage those that are uncertain.

    Attributes:
        op: ``cascade``.
        field: Field of the answer in which the models are compared: an enum, a boolean or a number.
        small: The small model.
        target: Share of the items on which the answers must agree with the model of the stage.
        delta: Probability with which that share may be missed.
        tolerance: Largest difference of two numbers that agree.
        samples: Answers of the small model to each item, whose agreement is the certainty; None:
            the certainty is the probability of the field's tokens, or the agreement of five
            answers if the server returns no log probabilities or refuses to.
        seed: Decides which items the model of the stage answers to measure the agreement.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op field small target delta tolerance samples seed",
    )

    op: Literal["cascade"] = "cascade"
    field: Annotated[str, Field(min_length=1)]
    small: SmallModelConfig
    target: Annotated[float, Field(gt=0, lt=1)] = 0.95
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    tolerance: Annotated[float, Field(ge=0)] | None = None
    samples: Annotated[int, Field(ge=2, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class ExtractConfig(OperatorConfig):
    """An item for each element of a list; the model is not asked.

    Attributes:
        op: ``extract``.
        path: The list in the columns: ``read.findings[]``; ``read.papers[].doi`` takes a field of
            each element.
        limit: Most elements of one item.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="op path limit")

    op: Literal["extract"]
    path: Annotated[str, Field(pattern=r"^[^\[\]]+(\[\][^\[\]]*)+$")]
    limit: Annotated[int, Field(ge=1, le=100_000)] = 1000


class DedupConfig(OperatorConfig):
    """The items without those that say the same as an earlier one.

    Attributes:
        op: ``dedup``.
        by: ``text``: equal texts, apart from case and blanks; ``embeddings``: also texts whose
            embeddings by the model of the stage are similar.
        text: Text of one item, with its columns in braces; None: the columns as JSON.
        threshold: Least cosine similarity of the embeddings of texts that say the same.
        ignore_case: Whether texts are equal that differ in case only.
    """

    access: ClassVar[dict[str, Access]] = declare_access(
        closed="op by text threshold ignore_case",
    )

    op: Literal["dedup"]
    by: Literal["text", "embeddings"] = "text"
    text: Annotated[str, Field(min_length=1)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    ignore_case: bool = True


class MergeConfig(OperatorConfig):
    """The answers about the parts of each document (``input.split``), put together.

    Attributes:
        op: ``merge``.
        field: The answers: the name of the stage that asked about the parts.
        how: ``concat``: lists and texts follow each other, all else is folded as by ``vote``;
            ``vote``: as the answers to several samples are folded.
        text: Column with the texts of the parts, which documents do not have; None: none.
    """

    access: ClassVar[dict[str, Access]] = declare_access(closed="op field how text")

    op: Literal["merge"]
    field: Annotated[str, Field(min_length=1)]
    how: Literal["concat", "vote"] = "concat"
    text: str | None = None


AnyOperatorConfig = Annotated[
    SummarizeConfig | RankConfig | ExtractConfig | DedupConfig | MergeConfig,
    Field(discriminator="op"),
]
"""Settings of any operator."""


def _list_models(annotation: Any) -> tuple[type[BaseModel], ...]:
    if isinstance(annotation, type):
        return (annotation,)
    return tuple(get_args(get_args(annotation)[0]))


OPERATOR_CONFIGS: Final[dict[str, type[BaseModel]]] = {
    get_args(model.model_fields["op"].annotation)[0]: model
    for model in _list_models(AnyOperatorConfig)
}
"""The settings of each operator, by its name in ``reduce``."""
