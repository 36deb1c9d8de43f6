"""``fanfold evaluate``: answers of a run compared with gold values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.core.errors import ConfigurationError
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Json
from ...backends.storage.run_folder import (
    EVALUATION_REFUSED,
    RunFolder,
    open_folder,
    read_evaluation,
    write_evaluation,
)
from ...configs.evaluation import (
    Evaluation,
    EvaluationConfig,
    resolve_evaluation,
    resolve_evaluations,
)
from ...configs.raw_settings import expand_variables, get_at_path, read_settings
from ..run.console import print_json, print_messages
from ..run.result_rows import ResultSource, open_result_source, read_prompts
from ..run.rich_console import Terminal
from .evaluation_text import show_evaluations


@dataclass(frozen=True, slots=True)
class GoldOptions:
    """Options of the command: what is compared with what.

    Attributes:
        gold: Column with the gold values; None takes the comparisons of the settings.
        field: Field of the answer.
        file: File with the gold values; None takes the run's input.
        file_id: Column of the file with the ids of the items.
    """

    gold: str | None = None
    field: str | None = None
    file: Path | None = None
    file_id: str | None = None

    def check(self) -> None:
        """Check that the options fit together.

        Raises:
            ConfigurationError: One is missing.
        """
        if (self.gold is None) != (self.field is None):
            raise ConfigurationError("give both --gold COLUMN and --field NAME, or neither")
        if self.file is not None and self.gold is None:
            raise ConfigurationError("--gold-file needs --gold COLUMN and --field NAME")
        if self.file_id is not None and self.file is None:
            raise ConfigurationError("--gold-id needs --gold-file FILE")


def evaluate_run(path: Path, options: GoldOptions, as_json: bool) -> None:
    """Compare the answers of a run with gold values, show the figures, and keep them.

    Args:
        path: The run folder.
        options: What is compared with what.
        as_json: Print JSON instead of tables.

    Raises:
        ConfigurationError: The answers are simulated, there is nothing to compare, or a field or
            file does not fit.
        JournalError: The run is damaged.
    """
    options.check()
    folder = open_folder(path)
    if folder.read_provenance()["simulated"]:
        raise ConfigurationError(f"{path}: {EVALUATION_REFUSED}")
    settings = read_settings(folder.settings).data
    if get_at_path(settings, ("input", "format")) == "openai_batch":
        msg = (
            f"{path}: its answers are whole responses (input.format), not fields to compare; to "
            "evaluate a model, ask by task.prompt over a table of rows"
        )
        raise ConfigurationError(msg)
    with open_result_source(folder) as source:
        found = _compute(folder, settings, source, options)
        left = source.journal.count_items().open
    kept = _keep(folder, found, replaces_all=options.gold is None)
    if as_json:
        print_json({"version": 1, "simulated": False, "evaluations": found})
        return
    show_evaluations(found, Terminal())
    if left:
        print_messages([f"{count_nouns(left, 'open item')}, counted as missing"])
    print_messages(
        [f"Evaluation: {folder.evaluation}"]
        if kept
        else ["not written to the run folder, because a session works on the run"]
    )


def _compute(
    folder: RunFolder, settings: dict[str, Any], source: ResultSource, options: GoldOptions
) -> list[dict[str, Any]]:
    from ..run.evaluation import INPUT, Evaluator, find_leaks, read_gold_file

    inputs = source.store.summary().row_schema
    evaluations = _resolve(folder, settings, options, inputs)
    values: dict[str, Json] | None = None
    if options.file is None:
        prompt = read_prompts(settings, str(folder.settings)).prompt
        notes = {} if prompt is None else find_leaks(prompt, evaluations, inputs)
    else:
        (one,) = evaluations
        column = options.file_id or get_at_path(settings, ("input", "id")) or "id"
        values = read_gold_file(options.file, str(column), one.gold)
        notes = {one.gold: _describe_match(source, values, options.file)}
    source_name = INPUT if options.file is None else options.file.name
    evaluator = Evaluator(evaluations, notes, values, source_name)
    for row in source.iter_rows():
        evaluator.add(row)
    journal, store = source.journal, source.store
    open_items = [n for n in range(len(store)) if not journal.is_finished(n)]
    if open_items:
        names = list(store.iter_ids())
        for n, (row, _) in zip(open_items, store.iter_rows(open_items), strict=True):
            evaluator.add_open(names[n], row)
    return evaluator.to_json()


def _resolve(
    folder: RunFolder, settings: dict[str, Any], options: GoldOptions, inputs: Mapping[str, Any]
) -> list[Evaluation]:
    """Return the comparisons that the options or the settings name.

    Raises:
        ConfigurationError: There are none, or a field does not exist.
    """
    schema = get_at_path(settings, ("task", "schema"))
    if options.gold is not None and options.field is not None:
        known = inputs if options.file is None else None
        try:
            return [resolve_evaluation(options.gold, options.field, schema, known)]
        except ConfigurationError as error:
            msg = f"--gold {options.gold} --field {options.field}: {error.message}"
            raise ConfigurationError(msg) from None
    given = {"evaluate": settings.get("evaluate") or []}
    if not given["evaluate"]:
        raise ConfigurationError(
            f"{folder.path}: its settings have no section evaluate; give --gold COLUMN and "
            "--field NAME"
        )
    filled = expand_variables(given, os.environ, str(folder.settings))["evaluate"]
    configs = [EvaluationConfig.model_validate(one) for one in filled]
    return resolve_evaluations(configs, schema, inputs)


def _describe_match(
    source: ResultSource, values: Mapping[str, Json], gold_file: Path | None
) -> list[str]:
    """Return how many ids of a gold file are those of items.

    Raises:
        ConfigurationError: There are none.
    """
    matched = sum(name in values for name in source.store.iter_ids())
    if not matched:
        first, *_ = [*values, "none"]
        item = next(iter(source.store.iter_ids()))
        raise ConfigurationError(
            f"--gold-file {gold_file}: none of its {len(values):,} ids is that of an item (first "
            f"id: {first!r}, first item: {item!r}); name the id column with --gold-id"
        )
    extra = len(values) - matched
    return [f"rows of {gold_file} that belong to no item: {extra:,}"] if extra else []


def _keep(folder: RunFolder, found: list[dict[str, Any]], replaces_all: bool) -> bool:
    """Write comparisons to the run folder, unless a session works on it; return True if written."""
    if folder.is_in_use():
        return False
    before: list[dict[str, Any]] = []
    if not replaces_all:
        known = {(one["gold"], one["field"]) for one in found}
        kept = read_evaluation(folder) or {"evaluations": []}
        before = [one for one in kept["evaluations"] if (one["gold"], one["field"]) not in known]
    write_evaluation(folder, [*before, *found], simulated=False)
    return True
