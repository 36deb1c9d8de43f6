"""A pipeline of stages: each stage, and each level of an operator, is an ordinary run."""

from __future__ import annotations

import asyncio
import math
import secrets
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from ...backends.core.aio import call_stoppable
from ...backends.core.errors import ConfigurationError, InputError, JournalError
from ...backends.core.fields import split_column
from ...backends.core.money import Amount
from ...backends.core.selection import Selection
from ...backends.core.text_tokens import estimate_text_tokens
from ...backends.core.types import PART_COLUMN, Json
from ...backends.discovery.connect import ReadyEndpoints, check_endpoints
from ...backends.discovery.node_local import ready_endpoints
from ...backends.discovery.resolve import has_own_servers
from ...backends.inputs.base import InputSummary, did_you_mean
from ...backends.inputs.item_store import (
    EntrySource,
    ItemStore,
    NamedRows,
    compute_rows_digest,
    load_input,
    load_rows,
)
from ...backends.storage.journal import Journal
from ...backends.storage.journal_file import TAKEN_OVER_FILE
from ...backends.storage.journal_writer import JournalWriter
from ...backends.storage.results import replace_file, write_jsonl, write_parquet
from ...backends.storage.run_folder import (
    RunFolder,
    StagePlace,
    create_folder,
    flush_folders,
    get_folder_identity,
    get_run_ids,
    place_to_be,
    utc_timestamp,
    write_bytes,
    write_json,
)
from ...configs.loader import LoadedConfig, load_stage, make_portable
from ...configs.models import BATCH_PROMPT
from ...configs.stages import StageConfig, find_source, keep_split
from ...configs.yaml_text import to_yaml
from ...nodes.operators import (
    Answer,
    Cascade,
    FailedItem,
    LevelTask,
    Operator,
    OperatorEnd,
    Question,
    StageResult,
    StageTools,
    make_operator,
)
from .extend import ExtensionPlan
from .extend_pipeline import PipelineExtension, PipelinePlan
from .fingerprint import compute_fingerprint, diff_settings
from .input_check import check_input_setting
from .next_steps import FINISHED
from .pipeline_resources import PipelineResources
from .prepare import (
    ExtendRun,
    ReadyRun,
    check_settings_fit,
    describe_input,
    describe_session,
    has_file_changed,
    prepare_run,
    resume_run,
)
from .result_rows import ResultSource, make_result_layout
from .stage_folder import OPERATOR_FILE, is_finished, list_levels
from .stage_rows import StageReader, StageRows, describe_rows
from .stage_tokens import StageTokens

RunInner: TypeAlias = Callable[[ReadyRun], Awaitable[None]]
"""Runs one run of a pipeline to its end; raises if it stops before."""

_INPUT_FILE: Final = "input.arrow"
_SLICE: Final = 256
_CAUTION: Final = 1.15
"""Factor on estimated tokens, so that texts are rarely longer than their estimates."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        number: Its position, from 0.
        config: Its settings.
        loaded: The same as the settings of a run.
        source: Name of the stage whose results are its items; None for the input.
        folder: Its folder.
        small: The settings of the small model's levels, if the stage is a cascade.
    """

    number: int
    config: StageConfig
    loaded: LoadedConfig
    source: str | None
    folder: RunFolder
    small: LoadedConfig | None = None

    @property
    def name(self) -> str:
        """Return its name."""
        return self.config.name

    @property
    def is_finished(self) -> bool:
        """Return True if all of its items have ended and its results are written; blocks."""
        return is_finished(self.folder)

    def list_levels(self) -> list[RunFolder]:
        """Return the levels of an operator, in order, that were begun; blocks."""
        return list(list_levels(self.folder.path))

    def list_runs(self) -> list[RunFolder]:
        """Return the runs that ask the model: the stage itself, or its levels; blocks."""
        if self.config.operator is not None:
            return self.list_levels()
        return [self.folder] if self.folder.provenance.exists() else []

    def selection(self) -> dict[str, Json]:
        """Return what decides which results are its items."""
        return {"from": self.source, "where": self.config.where, "join": self.config.join}

    def choose_answer_tokens(self, context: int | None) -> int:
        """Return the most tokens of an answer: as set, or what the operator needs.

        Args:
            context: The model's context in tokens, or None if it is unknown.
        """
        given = (self.loaded.raw.get("model") or {}).get("max_tokens")
        if given is None and self.config.operator is not None:
            found = self.make_operator().choose_answer_tokens(context)
            if found is not None:
                return found
        return self.loaded.config.model.max_tokens

    def make_operator(self) -> Operator:
        """Return the operator."""
        assert self.config.operator is not None, "the stage has an operator"
        settings = self.config.operator.model_dump()
        if self.config.cascade is not None:
            settings |= {"task": self.loaded.raw["task"], "names": list_columns(self.loaded)}
        return make_operator(settings)


def list_columns(loaded: LoadedConfig) -> tuple[str, ...]:
    """Return the columns that a task uses: those of its prompt and its images."""
    images = loaded.config.task.images
    return (*loaded.config.parse_prompt().columns, *(images.columns if images else ()))


def list_stages(loaded: LoadedConfig, root: Path) -> list[Stage]:
    """Return the stages of a pipeline.

    Args:
        loaded: Its settings.
        root: Its folder.
    """
    stages, found = loaded.config.stages or [], list[Stage]()
    for number, config in enumerate(stages):
        folder = RunFolder(root / "stages" / config.name)
        source = find_source(stages, number)
        stage = Stage(number, config, load_stage(loaded, number), source, folder)
        operator = None if config.cascade is None else stage.make_operator()
        if isinstance(operator, Cascade):
            changes = _level_settings(stage, operator.make_small_task())
            stage = replace(stage, small=load_stage(loaded, number, changes))
        found.append(stage)
    return found


def list_models(stages: Sequence[Stage]) -> Iterator[tuple[str, LoadedConfig]]:
    """Yield the settings of each model that stages use, with the name of its stage."""
    for stage in stages:
        yield stage.name, stage.loaded
        if stage.small is not None:
            yield f"{stage.name}, small", stage.small


def list_served(loaded: LoadedConfig) -> dict[str, LoadedConfig]:
    """Return the settings of the models that ``node.serve`` serves, the first use of each.

    Args:
        loaded: The settings of a run or a pipeline.

    Returns:
        By the name of the model; of a pipeline, in the order of its stages.

    Raises:
        ConfigurationError: A model has no name.
    """
    if loaded.config.node.serve is None:
        return {}
    runs = [("", loaded)]
    if loaded.config.stages is not None:
        stages = list_models(list_stages(loaded, Path()))
        runs = [(f" of stage {name}", one) for name, one in stages]
    found = dict[str, LoadedConfig]()
    for where, one in runs:
        if not has_own_servers(one.config):
            continue
        if one.config.model.name is None:
            msg = (
                f"{loaded.source}: model.name{where} is missing; set it, because the servers of "
                "the job cannot be asked before it starts"
            )
            raise ConfigurationError(msg)
        found.setdefault(one.config.model.name, one)
    return found


def find_stage_warnings(loaded: LoadedConfig) -> list[str]:
    """Return a line for each setting of an operator that is likely to fail."""
    return [
        f"stage {stage.name}: {line}"
        for stage in list_stages(loaded, Path())
        if stage.config.operator is not None
        for line in stage.make_operator().find_warnings(stage.choose_answer_tokens(None))
    ]


async def prepare_pipeline(  # noqa: PLR0913 - each is given by one kind of caller
    loaded: LoadedConfig,
    path: Path,
    items: Sequence[Mapping[str, Any]] | None = None,
    allow_simulated: bool = True,
    *,
    defer_endpoints: bool = False,
    extension: PipelineExtension | None = None,
) -> RunFolder:
    """Check all stages, and create the folder of a pipeline with its first stage.

    Args:
        loaded: The settings of the pipeline.
        path: The folder to create.
        items: Items that replace the configured input.
        allow_simulated: Allow a simulated fleet.
        defer_endpoints: Do not check the endpoints, because a job will start them.
        extension: The pipeline that it extends, or None.

    Raises:
        ConfigurationError: A setting or the input is wrong; no folder is left behind.
    """
    check_input_setting(loaded, items)
    for _, one in () if defer_endpoints else list_models(list_stages(loaded, path)):
        check_endpoints(one)
    making = create_folder(path)
    folder = await asyncio.to_thread(making.__enter__)
    try:
        first = list_stages(loaded, folder.path)[0]
        await asyncio.to_thread(folder.stages.mkdir)
        place = StagePlace(path, f"stages/{first.name}", limits=_own_limits(first))
        plan = _StartPlan(extension, loaded)
        if first.config.operator is None:
            note = _note({"selection": first.selection(), "passed_on": None})
            run = await prepare_run(
                first.loaded,
                first.folder.path,
                items,
                allow_simulated,
                defer_endpoints,
                extend=plan.make_extend(first, note),
                place=place,
            )
            with ItemStore(run.folder.items) as store:
                summary = store.summary()
        else:
            summary = await call_stoppable(_load_first, first, place, items)
            simulated = first.loaded.config.endpoints.simulated is not None
            model = first.loaded.config.model.name or ""
            await plan.confirm(first.folder.path / _INPUT_FILE, simulated, model, None)
        check_columns(loaded, summary)
        about: dict[str, Any] = {
            "run": secrets.token_hex(8),
            "earlier": [],
            "place": await asyncio.to_thread(place_to_be, folder),
            "name": loaded.config.name,
            "config": loaded.source,
            "stages": [stage.name for stage in loaded.config.stages or ()],
            "simulated": loaded.config.endpoints.simulated is not None,
            "model": loaded.config.model.name or "",
            "price": None,
            "fingerprint": "",
            "input": describe_input(summary, loaded.config.input.path if items is None else None),
            "sessions": [],
        }
        if extension is not None:
            about["from"] = extension.to_json()
        settings = to_yaml(make_portable(loaded.plain, path)).encode()
        await asyncio.to_thread(write_bytes, folder.settings, settings)
        await asyncio.to_thread(folder.write_provenance, about)
    except BaseException as error:
        await asyncio.to_thread(making.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(making.__exit__, None, None, None)
    return RunFolder(path)


def write_settings(folder: RunFolder, loaded: LoadedConfig) -> None:
    """Write changed settings of a pipeline, unless another process works on it; blocks.

    Raises:
        ConfigurationError: The settings have other stages, or change one that has begun; nothing
            was written.
        JournalError: A file of a stage is damaged.
    """
    known = folder.read_provenance()["stages"]
    names = [stage.name for stage in loaded.config.stages or ()]
    if names[: len(known)] != known:
        msg = (
            f"{folder.path}: this pipeline has the stages {', '.join(known)}, and the settings "
            f"{', '.join(names)}; stages can be added at the end only: use a new run folder"
        )
        raise ConfigurationError(msg)
    for stage in list_stages(loaded, folder.path):
        _check_begun(stage)
    with folder.lock():
        text = to_yaml(make_portable(loaded.plain, folder.path))
        write_bytes(folder.settings, text.encode())
        folder.write_provenance(folder.read_provenance() | {"stages": names})


def _check_begun(stage: Stage) -> None:
    """Check that the settings of a stage fit what it has done, if it has begun; blocks.

    Raises:
        ConfigurationError: They do not.
        JournalError: A file of the stage is damaged.
    """
    folder = stage.folder
    if stage.config.operator is not None:
        if (folder.path / OPERATOR_FILE).exists():
            _read_operator(stage)
    elif folder.provenance.exists():
        _check_selection(stage)
        check_settings_fit(folder, folder.read_provenance(), stage.loaded)


@dataclass(frozen=True, slots=True)
class _StartPlan:
    """What a new pipeline takes over from another one, and whether it may begin.

    Attributes:
        extension: The other pipeline, or None.
        loaded: The settings of the new one.
    """

    extension: PipelineExtension | None
    loaded: LoadedConfig

    def make_extend(self, first: Stage, note: ExtendRun) -> ExtendRun:
        """Return a function that fills the journal of the first stage."""
        extension = self.extension
        if extension is None:
            return note

        async def extend(folder: RunFolder, about: Mapping[str, Any]) -> dict[str, Any]:
            async def confirm(plan: ExtensionPlan | None) -> None:
                await self.confirm(folder.items, bool(about["simulated"]), about["model"], plan)

            make = extension.make_extend(first.name, first.loaded, note, confirm)
            return await make(folder, about)

        return extend

    async def confirm(
        self, items: Path, simulated: bool, model: str, first: ExtensionPlan | None
    ) -> None:
        """Show the plan, as far as it is known before the first call."""
        if self.extension is None or self.extension.confirm is None:
            return
        known, stages = self.extension, self.loaded.config.stages or ()
        counts = {
            stage.name: await asyncio.to_thread(known.count_answers, stage.name) for stage in stages
        }
        path = known.source.path
        plan = PipelinePlan(known.run, path, simulated, model, items, first, counts)
        await self.extension.confirm(plan)


def _load_first(
    stage: Stage, place: StagePlace, items: Sequence[Mapping[str, Any]] | None
) -> InputSummary:
    """Create the folder of a first stage that is an operator, with the configured input."""
    columns = stage.make_operator().columns
    with create_folder(stage.folder.path) as folder:
        target = folder.path / _INPUT_FILE
        summary: InputSummary = load_input(stage.loaded.config.input, target, columns, items)
        folder.write_place(place)
        _write_operator(folder, stage, summary.items, None)
    return summary


def check_columns(loaded: LoadedConfig, summary: InputSummary) -> None:
    """Check that the columns that later stages use will exist.

    Args:
        loaded: The settings of the pipeline.
        summary: Summary of the input.

    Raises:
        ConfigurationError: A stage uses a column that its items will not have.
    """
    rows = dict[str | None, Mapping[str, Any]]()
    rows[None] = summary.row_schema
    results = dict[str | None, tuple[Mapping[str, Any] | None, Mapping[str, Any]]]()
    for stage in list_stages(loaded, Path()):
        schema = dict(rows[stage.source])
        if stage.config.where is not None:
            _check_where(stage, *results[stage.source])
        if stage.config.join is not None:
            for earlier in rows:
                if earlier is not None and earlier not in schema["properties"]:
                    found = rows[earlier]["properties"][earlier]
                    schema["properties"] = {**schema["properties"], earlier: found}
        _check_names(stage, schema["properties"])
        operator = None if stage.config.operator is None else stage.make_operator()
        answer = stage.loaded.config.result_schema
        if operator is not None and stage.loaded.config.task.samples > 1:
            msg = (
                f"stages: {stage.name}: an operator asks each of its questions once; set "
                "samples in the map of other stages, not in the common task"
            )
            raise ConfigurationError(f"{loaded.source}: {msg}")
        if operator is not None:
            try:
                answer = operator.describe_results(schema)
            except ConfigurationError as error:
                raise ConfigurationError(f"{stage.loaded.source}: {error.message}") from None
            schema = dict(operator.describe_columns(schema))
        if stage.name in schema["properties"]:
            msg = f"stages: the items have a column {stage.name!r}; rename the stage of this name"
            raise ConfigurationError(f"{loaded.source}: {msg}")
        rows[stage.name] = describe_rows(schema, stage.name, answer)
        results[stage.name] = answer, schema


def _check_where(
    stage: Stage, answer: Mapping[str, Any] | None, columns: Mapping[str, Any]
) -> None:
    try:
        Selection.parse(str(stage.config.where), answer, columns)
    except ConfigurationError as error:
        raise ConfigurationError(f"{stage.loaded.source}: where: {error.message}") from None


def _check_names(stage: Stage, properties: Mapping[str, Any]) -> None:
    if stage.config.operator is not None:
        names: Iterable[str] = stage.make_operator().columns
    else:
        names = stage.loaded.config.parse_prompt().columns
    for name in names:
        found = split_column(name, properties)
        if found is None:
            inner = [
                f"{one}.{key}"
                for one, schema in properties.items()
                for key in schema.get("properties", ())
            ]
            msg = (
                f"{stage.loaded.source}: there is no column {name!r}; its items have "
                f"{', '.join([*properties, *inner])}{_suggest(name, inner)}"
            )
            if name.partition(".")[0] == PART_COLUMN:
                msg += f"; input.split adds {PART_COLUMN!r} to the items of the first stage"
            raise ConfigurationError(msg)


def _suggest(name: str, inner: Sequence[str]) -> str:
    """Return the field of an answer that has a name, as a question."""
    same = [one for one in inner if one.partition(".")[2] == name]
    return f"; did you mean {same[0]!r}?" if same else did_you_mean(name, inner)


class Pipeline:
    """The stages of a pipeline, run one after the other.

    Args:
        folder: The folder of the pipeline; the caller has locked it.
        loaded: Its settings.
        stages: Its stages.
        resources: What its runs share.
        allow_simulated: Allow a simulated fleet.
        estimate_reserve: Returns what the budget keeps during a stage, by its items; blocks.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a session has, handed on once
        self,
        folder: RunFolder,
        loaded: LoadedConfig,
        stages: Sequence[Stage],
        resources: PipelineResources,
        allow_simulated: bool = True,
        estimate_reserve: Callable[[Stage, Path], Amount] | None = None,
    ) -> None:
        self.folder, self.loaded, self.stages = folder, loaded, stages
        self._estimate_reserve = estimate_reserve
        self._resources, self._allow_simulated = resources, allow_simulated
        self._session: dict[str, Any] | None = None
        self._extension = list[PipelineExtension | None]()

    async def run_stage(self, stage: Stage, run: RunInner) -> None:
        """Run a stage to its end; earlier stages have ended.

        Args:
            stage: The stage.
            run: Runs one run.

        Raises:
            ConfigurationError: The settings do not fit what an earlier session has done.
            JournalError: A file is damaged or cannot be written.
        """
        if stage.config.operator is None:
            await self._run_map(stage, run)
        else:
            await _OperatorRun(self, stage, run).run()

    async def _run_map(self, stage: Stage, run: RunInner) -> None:
        place = self.make_place(stage, stage.folder)
        if stage.folder.provenance.exists():
            place = await self._keep_for_later(stage, place, stage.folder.items)
            await asyncio.to_thread(_check_selection, stage)
            await self.resume(stage.folder, stage.loaded, place, run)
            return
        rows = self.open_rows(stage)
        source = await asyncio.to_thread(rows.open)

        async def note(_folder: RunFolder, _about: Mapping[str, Any]) -> dict[str, Any]:
            return {"selection": stage.selection(), "passed_on": rows.counts.to_json()}

        ready = await self.prepare(stage.folder, stage.loaded, place, source, note)
        place = await self._keep_for_later(stage, place, stage.folder.items)
        await asyncio.to_thread(stage.folder.write_place, place)
        await run(ready)

    async def _keep_for_later(self, stage: Stage, place: StagePlace, items: Path) -> StagePlace:
        """Return the place with what the budget keeps for later stages that reduce."""
        if self._estimate_reserve is None:
            return place
        kept = await asyncio.to_thread(self._estimate_reserve, stage, items)
        return replace(place, kept={k: v for k, v in kept.to_json().items() if v})

    async def prepare(
        self,
        folder: RunFolder,
        loaded: LoadedConfig,
        place: StagePlace,
        source: EntrySource,
        note: ExtendRun,
    ) -> ReadyRun:
        """Create a run of the pipeline for a session that follows at once.

        Args:
            folder: The folder to create.
            loaded: The settings.
            place: Its place in the pipeline.
            source: Its items.
            note: Returns what to add to the provenance, once the items are written.
        """
        if not self._extension:  # read once: a warning about a folder that is gone is enough
            self._extension = [await asyncio.to_thread(PipelineExtension.read, self.folder)]
        if (extension := self._extension[0]) is not None:
            note = extension.make_extend(place.stage, loaded, note)

        async def extend(made: RunFolder, about: Mapping[str, Any]) -> dict[str, Any]:
            if self._session is None:
                self._session = await asyncio.to_thread(describe_session, folder)
            session = {**self._session, "started": utc_timestamp()}
            return {**await note(made, about), "sessions": [session]}

        probed = self._resources.find_probed(loaded)
        made = await prepare_run(
            loaded,
            folder.path,
            allow_simulated=self._allow_simulated,
            extend=extend,
            source=source,
            place=place,
            probed=probed,
        )
        if probed is None and made.endpoints is not None:
            self._resources.keep_probed(loaded, made.endpoints)
        return replace(await self._share_resources(made), is_begun=True)

    async def resume(
        self, folder: RunFolder, loaded: LoadedConfig, place: StagePlace, run: RunInner
    ) -> None:
        """Check that the settings fit a run, and run what is left of it."""
        await asyncio.to_thread(folder.write_place, place)
        ready = await resume_run(folder, loaded)
        if ready.reduce_changed or not await asyncio.to_thread(is_finished, folder):
            await run(await self._share_resources(ready))

    async def _share_resources(self, run: ReadyRun) -> ReadyRun:
        shared = await self._resources.open_endpoints(run.loaded)
        return replace(run, endpoints=shared or run.endpoints, resources=self._resources)

    async def find_endpoints(self, loaded: LoadedConfig) -> ReadyEndpoints:
        """Return the endpoints of a stage, to learn about its model."""
        if (shared := await self._resources.open_endpoints(loaded)) is not None:
            return shared
        async with ready_endpoints(loaded.config, loaded.plain["endpoints"]) as ready:
            return ready

    def open_rows(self, stage: Stage) -> StageRows:
        """Return the items of a stage from the results of earlier ones."""
        assert stage.source is not None, "the first stage reads the input"
        joined = (
            [one.name for one in self.stages[: stage.number] if one.name != stage.source]
            if stage.config.join is not None
            else []
        )
        return StageRows(self.folder.path, stage.source, stage.config.where, joined)

    def iter_failed(self, stage: Stage) -> Iterator[FailedItem]:
        """Yield the items that failed in the stages before one that keep the ids of items; blocks.

        Raises:
            JournalError: An earlier stage is damaged.
        """
        by_name, sources = {one.name: one for one in self.stages}, list[Stage]()
        while stage.source is not None:
            stage = by_name[stage.source]
            sources.append(stage)
            if stage.config.reduces:
                break
        for one in reversed(sources):
            with closing(StageReader(one.name, one.folder.path)) as reader:
                yield from reader.iter_failed()

    def make_place(self, stage: Stage, folder: RunFolder) -> StagePlace:
        """Return the place of a run of a stage."""
        key = str(folder.path.relative_to(self.folder.path))
        return StagePlace(self.folder.path, key, {}, _own_limits(stage))


class _OperatorRun:
    """One operator at work: it asks its levels, each of which is a run."""

    def __init__(self, pipeline: Pipeline, stage: Stage, run: RunInner) -> None:
        self._pipeline, self._stage, self._run = pipeline, stage, run
        self._levels, self._asking = 0, False
        self._answer_tokens = 0
        self._open = list[LevelAnswers]()
        self._settings = dict[str, LoadedConfig]()

    async def run(self) -> None:
        stage, folder = self._stage, self._stage.folder
        if not folder.path.exists():
            rows = self._pipeline.open_rows(stage)
            await asyncio.to_thread(self._create, rows)
        kept = await asyncio.to_thread(_read_operator, stage)
        place = self._pipeline.make_place(stage, folder)
        await asyncio.to_thread(folder.write_place, place)
        if folder.provenance.exists():
            return
        if "answer_tokens" not in kept:
            ready = await self._pipeline.find_endpoints(stage.loaded)
            lengths = (spec.max_model_len for spec in ready.specs if spec.max_model_len)
            context = min(lengths, default=None)
            found = {
                "context": context,
                "answer_tokens": stage.choose_answer_tokens(context),
                "streams": stage.loaded.config.limits.streams,
                "model": ready.model,
                "simulated": ready.simulated,
            }
            kept |= found
            await asyncio.to_thread(write_json, folder.path / OPERATOR_FILE, kept)
        self._answer_tokens = kept["answer_tokens"]
        tokens = await asyncio.to_thread(
            StageTokens, folder.path, lambda: self._pipeline.find_endpoints(stage.loaded)
        )
        with ItemStore(folder.path / _INPUT_FILE) as store:
            tools = StageTools(
                items=store,
                columns=store.columns,
                ask=self._ask,
                count_tokens=_count_tokens,
                context_tokens=kept["context"],
                answer_tokens=kept["answer_tokens"],
                streams=kept["streams"],
                count_exact=tokens.count,
                folder=folder.path,
                row_schema=await asyncio.to_thread(self._describe_rows),
                read_failed=lambda: self._pipeline.iter_failed(stage),
            )
            try:
                end = await stage.make_operator().run(tools)
                await self._finish(kept, end, store)
            finally:
                await tokens.aclose()
                for answers in self._open:
                    answers.close()

    def _create(self, rows: StageRows) -> None:
        stage = self._stage
        with create_folder(stage.folder.path) as folder:
            summary = load_rows(folder.path / _INPUT_FILE, rows.open())
            folder.write_place(self._pipeline.make_place(stage, stage.folder))
            _write_operator(folder, stage, summary.items, rows.counts.to_json())

    async def _ask(
        self, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> Sequence[Answer]:
        if self._asking:
            raise RuntimeError("an operator asks one level after the other")
        self._asking = True
        try:
            self._levels += 1
            folder = RunFolder(self._stage.folder.path / "levels" / str(self._levels))
            await self._run_level(folder, level, task, questions)
            answers = await asyncio.to_thread(LevelAnswers, folder)
        finally:
            self._asking = False
        self._open.append(answers)
        return answers

    async def _run_level(
        self, folder: RunFolder, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> None:
        stage, pipeline = self._stage, self._pipeline
        loaded = self._load_level(task)
        source = NamedRows(f"level {level!r} of stage {stage.name!r}", _iter_questions(questions))
        place = pipeline.make_place(stage, folder)
        if not folder.provenance.exists():
            note = _note({"level": level} | ({"asks_again": True} if task.asks_again else {}))
            await self._run(await pipeline.prepare(folder, loaded, place, source, note))
            return
        digest = await asyncio.to_thread(compute_rows_digest, source)
        about = await asyncio.to_thread(folder.read_provenance)
        if digest != about["input"]["digest"]:
            msg = (
                f"{folder.path}: the items of level {level!r} of stage {stage.name!r} differ from "
                "those that an earlier session has asked; the settings of the stage, or fanfold, "
                "changed meanwhile: continue with those of that session, or start a new run"
            )
            raise ConfigurationError(msg)
        await pipeline.resume(folder, loaded, place, self._run)

    def _load_level(self, task: LevelTask) -> LoadedConfig:
        """Return the settings of a level; most levels of a stage have the same."""
        settings = _level_settings(self._stage, task, self._answer_tokens)
        key = repr(settings)
        if key not in self._settings:
            loaded = load_stage(self._pipeline.loaded, self._stage.number, settings)
            self._settings[key] = loaded
        return self._settings[key]

    async def _finish(self, kept: Mapping[str, Any], end: OperatorEnd, store: ItemStore) -> None:
        """Write the results as those of a run whose items are the results."""
        stage, folder = self._stage, self._stage.folder
        rows_schema = await asyncio.to_thread(self._describe_rows)
        schema = stage.make_operator().describe_results(rows_schema)
        task = stage.loaded.raw["task"] | {"schema": dict(schema)}
        operator = stage.make_operator()
        if isinstance(operator, Cascade):
            task["certainty"] = operator.field
        section = {"max_tokens": self._answer_tokens} | (stage.loaded.raw.get("model") or {})
        settings = {"task": task, "model": section}
        loaded = load_stage(self._pipeline.loaded, stage.number, settings)
        named = ((one.id, one.row) for one in end.results)
        types = {one.name: one.type for one in store.types} if operator.passes_columns else None
        id_column = store.id_column if operator.passes_columns else None
        rows = NamedRows(f"results of stage {stage.name!r}", named, types, id_column)
        try:
            summary = await asyncio.to_thread(load_rows, folder.items, rows)
        except InputError:
            found = "; ".join(end.report.get("lines", ()))
            msg = f"stage {stage.name!r} ({end.report.get('op')}) has no results"
            raise InputError(f"{msg}: {found}" if found else msg) from None
        model, simulated = str(kept["model"]), bool(kept["simulated"])
        about: dict[str, Any] = {
            "run": secrets.token_hex(8),
            "earlier": [],
            "place": await asyncio.to_thread(get_folder_identity, folder.path),
            "name": loaded.config.name,
            "config": loaded.source,
            "simulated": simulated,
            "model": model,
            "price": None,
            "fingerprint": compute_fingerprint(loaded.config, model, simulated),
            "input": describe_input(summary, None),
            "selection": kept["selection"],
            "passed_on": kept["passed_on"],
            "sessions": [{"started": utc_timestamp(), "ended": utc_timestamp()}],
        }
        failed = await self._write_records(end.results, about, loaded)
        last = {"outcome": FINISHED, "done": summary.items - failed, "failed": failed, "usd": None}
        about["sessions"][0] |= last
        await asyncio.to_thread(_write_result_files, folder, loaded, about, end.report)

    def _describe_rows(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the items; blocks."""
        stage = self._stage
        if stage.source is not None:
            return self._pipeline.open_rows(stage).describe()
        with ItemStore(stage.folder.path / _INPUT_FILE) as store:
            return store.summary().row_schema

    async def _write_records(
        self, results: Iterable[StageResult], about: Mapping[str, Any], loaded: LoadedConfig
    ) -> int:
        """Write the journal; return the number of failed results."""
        path = self._stage.folder.journal / TAKEN_OVER_FILE
        await asyncio.to_thread(path.unlink, missing_ok=True)
        header = {"run": about["run"], "session": f"results of the operator {self._stage.name}"}
        writer, failed = JournalWriter(path, header, loaded.config.journal.fsync_s), 0
        try:
            numbered = enumerate(results)
            while some := await asyncio.to_thread(list, islice(numbered, _SLICE)):
                for index, one in some:
                    failed += one.error_class is not None
                    writer.write(_make_record(self._stage.name, index, one, about))
        finally:
            await writer.close()
        return failed


class LevelAnswers(Sequence[Answer]):
    """The answers of a level, read from its journal when they are used.

    Args:
        folder: The folder of the level, whose items have all ended.
    """

    def __init__(self, folder: RunFolder) -> None:
        about = folder.read_provenance()
        self._folder, self._total = folder.journal, about["input"]["items"]
        self._journal = Journal(folder.journal, get_run_ids(about), self._total)

    def __len__(self) -> int:
        """Return the number of questions."""
        return int(self._total)

    def __getitem__(self, at: Any) -> Any:
        """Return one answer, or a list of them; blocks."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        return _make_answer(self._journal.read_record(range(len(self))[at]))

    def __iter__(self) -> Iterator[Answer]:
        """Yield the answers in order; blocks."""
        for lo in range(0, len(self), _SLICE):
            some = self._journal.read_answers(lo, min(lo + _SLICE, len(self)), whole=True)
            for index, record in enumerate(some, start=lo):
                if record is None:
                    msg = (
                        f"{self._folder}: the answer to question {index + 1} is gone; put the "
                        "missing files of the journal back, or start a new run"
                    )
                    raise JournalError(msg)
                yield _make_answer(record)

    def close(self) -> None:
        """Close the files."""
        self._journal.close()


def _make_answer(record: dict[str, Any]) -> Answer:
    return Answer(
        str(record["id"]),
        record.get("output"),
        record.get("error_class"),
        record.get("error"),
        record,
    )


def _own_limits(stage: Stage) -> dict[str, float]:
    budget = stage.config.budget
    return {} if budget is None else budget.model_dump(exclude_none=True)


def _note(facts: Mapping[str, Any]) -> ExtendRun:
    """Return a function that adds facts to the provenance of a new run."""

    async def note(_folder: RunFolder, _about: Mapping[str, Any]) -> dict[str, Any]:
        return dict(facts)

    return note


def _check_selection(stage: Stage) -> None:
    """Check that a stage that was begun still takes its items from the same results.

    Raises:
        ConfigurationError: It does not.
    """
    _compare_selection(stage, stage.folder.read_provenance()["selection"])


def _compare_selection(stage: Stage, known: Mapping[str, Any]) -> None:
    now = stage.selection()
    if changed := [key for key in now if now[key] != known.get(key)]:
        lines = ", ".join(f"{key}: {known.get(key)!r} → {now[key]!r}" for key in changed)
        msg = f"{stage.folder.path}: stage {stage.name!r} has begun with other items ({lines}); "
        raise ConfigurationError(f"{msg}use a new run folder")


def _write_operator(
    folder: RunFolder, stage: Stage, items: int, counts: Mapping[str, Any] | None
) -> None:
    assert stage.config.operator is not None, "the stage has an operator"
    data = {
        "v": 1,
        "reduce": stage.config.operator.model_dump(mode="json"),
        "selection": stage.selection(),
        "settings": _get_operator_settings(stage),
        "items": items,
        "passed_on": None if counts is None else dict(counts),
    }
    write_json(folder.path / OPERATOR_FILE, data)


def _get_operator_settings(stage: Stage) -> dict[str, Any]:
    """Return the settings beside those of an operator that its answers depend on."""
    sections = ["model"] if stage.config.cascade is None else ["model", "task"]
    sections += ["input"] if stage.source is None else []
    return {name: stage.loaded.plain[name] for name in sections}


def _read_operator(stage: Stage) -> dict[str, Any]:
    """Return what the folder keeps of an operator, if the settings are the same.

    Raises:
        ConfigurationError: The settings of the operator changed since it has begun.
        JournalError: The file is damaged.
    """
    assert stage.config.operator is not None, "the stage has an operator"
    path = stage.folder.path / OPERATOR_FILE
    try:
        kept: Any = orjson.loads(path.read_bytes())
        known, selection = dict(kept["reduce"]), dict(kept["selection"])
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path}: damaged ({error}); start a new run") from None
    _compare_selection(stage, selection)
    now = stage.config.operator.model_dump(mode="json")
    changed = [key for key in now if now[key] != known.get(key)]
    if (before := kept.get("settings")) is not None:
        name = kept.get("model") or before["model"].get("name") or ""
        changed += diff_settings(before, _get_operator_settings(stage), name)
    if not changed and stage.source is None:
        given, columns = stage.loaded.config.input, stage.make_operator().columns
        about = RunFolder(stage.folder.path.parents[1]).read_provenance()
        if has_file_changed(given, columns, about["input"]):
            changed.append(f"input: the content of {given.path} changed")
    if changed:
        msg = (
            f"{stage.folder.path}: stage {stage.name!r} has begun with other settings or items of "
            f"its operator ({', '.join(changed)}); use a new run folder"
        )
        raise ConfigurationError(msg)
    return dict(kept)


def _level_settings(
    stage: Stage, task: LevelTask, answer_tokens: int | None = None
) -> dict[str, Any]:
    changes: dict[str, Any] = {"input": {}, "reduce": []}
    if stage.config.cascade is not None:  # its questions are its items, which may be parts
        changes["input"] = keep_split(stage.loaded.raw.get("input"))
    else:  # they have nothing in common at their beginnings but what all have
        changes["limits"] = {**(stage.loaded.raw.get("limits") or {}), "order": "input"}
    repairs = stage.loaded.config.task.repairs
    changes["task"] = {"repairs": repairs} | dict(task.task)
    model = dict(stage.loaded.raw.get("model") or {})
    if answer_tokens is not None and model.get("max_tokens") is None:
        model["max_tokens"] = answer_tokens
    changes["model"] = {**model, **task.model}
    if task.is_requests:  # each request says all but the model
        changes["input"] = {"format": "openai_batch"}
        changes["task"] = {"prompt": BATCH_PROMPT}
        kept = ("name", "price")
        changes["model"] = {k: v for k, v in changes["model"].items() if k in kept}
    if task.endpoints is not None:
        given = task.endpoints
        changes["endpoints"] = given if isinstance(given, str) else dict(given)
    return changes


def _iter_questions(questions: Iterable[Question]) -> Iterator[tuple[str, dict[str, Json]]]:
    for question in questions:
        yield question.id, dict(question.row)


async def _count_tokens(texts: Sequence[str]) -> list[int]:
    return await asyncio.to_thread(_estimate_tokens, texts)


def _estimate_tokens(texts: Sequence[str]) -> list[int]:
    return [math.ceil(_CAUTION * estimate_text_tokens(text)) for text in texts]


def _make_record(
    stage: str, index: int, one: StageResult, about: Mapping[str, Any]
) -> dict[str, Json]:
    """Return the record of a result; it has cost nothing, its levels have."""
    counts = ("requests", "repairs", "reused", "prompt_tokens", "cached_tokens")
    costs = ("completion_tokens", "lost_tokens", "useful_tokens", "nano_usd", "useful_nano_usd")
    return {
        "stage": stage,
        "index": index,
        "id": one.id,
        "sample": 0,
        "status": "done" if one.error_class is None else "failed",
        "question": None,
        "output": one.output if one.error_class is None else None,
        "error_class": one.error_class,
        "error": one.error,
        "raw": None,
        "endpoint": None,
        "model": about["model"],
        "attempts": [],
        **dict.fromkeys((*counts, *costs), 0),
        "latency_s": 0.0,
        "finished_at": about["sessions"][0]["ended"],
        "simulated": about["simulated"],
        "fingerprint": "",
        "origin": None,
        **one.record,
    }


def _write_result_files(
    folder: RunFolder, loaded: LoadedConfig, about: dict[str, Any], report: Mapping[str, Any]
) -> None:
    """Write results and settings of an operator; the provenance last, which finishes it."""
    with (
        ItemStore(folder.items) as store,
        Journal(folder.journal, get_run_ids(about), len(store)) as journal,
    ):
        task = loaded.config.task
        certain = task.certainty is not None
        layout = make_result_layout(task.answer_schema, store, certain=certain)
        source = ResultSource(journal, store, layout, priced=False)
        write_parquet(source.iter_rows(), folder.results, layout)
        with replace_file(folder.failures) as file:
            write_jsonl(source.iter_rows("failed"), file, layout)
        content = {"v": 1, "run": about["run"], "simulated": about["simulated"]}
        last = about["sessions"][0]
        progress = {"items": len(store), "done": last["done"], "failed": last["failed"]}
        write_json(
            folder.aggregate,
            {
                **content,
                "progress": progress,
                "aggregate": [],
                "report": dict(report),
                "journal": journal.extents(),
            },
        )
    settings = to_yaml(make_portable(loaded.plain, folder.path)).encode()
    write_bytes(folder.settings, settings)
    folder.write_provenance(about)
    flush_folders(folder.path)


def remove_unfinished(folder: RunFolder) -> None:
    """Remove folders that a killed session left in preparation; blocks."""
    for parent in (folder.stages, *(one / "levels" for one in folder.stages.glob("[a-z]*"))):
        for partial in parent.glob(".*.*"):
            with suppress(OSError):
                shutil.rmtree(partial)
