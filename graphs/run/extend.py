"""Extend a run: take over finished items of another run, so that only the others are asked."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from ...backends.budget.price import read_price
from ...backends.budget.tokens import LIKELY_SHARE, estimate_prompt_tokens
from ...backends.core.errors import ConfigurationError, InvalidItemError, TruncatedAnswerError
from ...backends.core.images import add_images
from ...backends.core.samples import SampleFold
from ...backends.core.selection import Selection
from ...backends.core.types import Item, Json, Message, Row, find_row_id
from ...backends.inputs.column_types import describe_columns
from ...backends.inputs.images import ImageFolder, open_images
from ...backends.inputs.item_store import ItemStore
from ...backends.storage.journal import Journal, describe_lost_files, list_lost_files
from ...backends.storage.journal_file import TAKEN_OVER_FILE
from ...backends.storage.journal_writer import JournalWriter
from ...backends.storage.run_folder import RunFolder, get_run_ids, open_folder
from ...configs.loader import LoadedConfig
from ...configs.models import RunConfig
from ...configs.raw_settings import get_at_path, read_settings
from ...nodes.shard.record import ItemDigests
from .estimate import count_nodes, make_run_plan
from .fingerprint import compute_question_digest
from .forecast import AnswerLimit, Forecast, Range, RunPlan, forecast, measure_items

logger = logging.getLogger(__name__)

_BATCH: Final = 256
_CALIBRATION_TOKENS: Final = 1_000_000
"""Estimated tokens of finished prompts that are compared with their measured ones, at most."""
_DECIDING: Final = ("task", "model", "limits", "endpoints")
"""Sections whose change may turn a failure into an answer."""
_NO_EFFECT: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("name", "max_tokens", "max_tokens_field", "price"),
    "task": ("samples", "fold"),
}
"""Settings that do not count as such a change, or are compared apart."""


@dataclass(slots=True)
class ExtensionPlan:
    """What a run takes over from another one, and what it asks.

    Attributes:
        run: Id of the other run.
        path: Its folder.
        simulated: Whether the answers of both runs are simulated.
        done: Items taken over with an answer.
        failed: Items taken over as failed.
        new: Items to ask because the other run does not have them.
        changed: Items to ask because their question is another one.
        unfinished: Items to ask because the other run has not finished them.
        again: Finished items to ask again.
        invalid: Items that fail without a request.
        dropped: Items of the other run that this run does not have.
        only: Conditions that select items of the other run, or None.
        plan: Requests for the items to ask.
        forecast: Their estimate.
    """

    run: str
    path: Path
    simulated: bool
    done: int = 0
    failed: int = 0
    new: int = 0
    changed: int = 0
    unfinished: int = 0
    again: int = 0
    invalid: int = 0
    dropped: int = 0
    only: str | None = None
    plan: RunPlan | None = None
    forecast: Forecast | None = None

    @property
    def asked(self) -> int:
        """Return the number of items to ask."""
        return self.new + self.changed + self.unfinished + self.again

    def to_json(self) -> dict[str, Any]:
        """Return what the run's provenance keeps."""
        return {
            "run": self.run,
            "done": self.done,
            "failed": self.failed,
            "asked": self.asked,
            "dropped": self.dropped,
            "only": self.only,
        }


@dataclass(frozen=True, slots=True)
class Extension:
    """The run that a new run extends.

    Attributes:
        source: The folder of the other run; it is only read.
        loaded: The settings of the new run.
        ask_again: Finished items that are asked again: ``cut``, ``failed`` or ``all``; None decides
            by what has changed.
        confirm: Called with the plan before the new run's folder appears; it raises to stop.
        only: Conditions that select items of the other run, or None.
        selected: Ids of these items, or None.
    """

    source: RunFolder
    loaded: LoadedConfig
    ask_again: str | None
    confirm: Callable[[ExtensionPlan], Awaitable[None]]
    only: str | None = None
    selected: frozenset[str] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        loaded: LoadedConfig,
        ask_again: str | None,
        confirm: Callable[[ExtensionPlan], Awaitable[None]],
        only: str | None = None,
    ) -> Extension:
        """Check that a run can be extended, and select its items; blocks.

        Raises:
            ConfigurationError: There is no run, a session is working on it, or its items have no
                recorded questions.
            JournalError: It cannot be read, or has another format.
        """
        source = open_source(path)
        if source.is_pipeline:
            msg = (
                f"--from {path}: this is a pipeline of stages, and these settings have a single "
                f"task; name the folder of one of its stages ({path}/stages/NAME)"
            )
            raise ConfigurationError(msg)
        if loaded.config.input.is_batch:
            msg = (
                f"--from {path}: items that are requests (input.format) have no recorded "
                "question, so none can be taken over"
            )
            raise ConfigurationError(msg)
        if only is None:
            return cls(source, loaded, ask_again, confirm)
        selection, ids = _select_items(source, only)
        if ask_again is None and "failed" in selection.statuses:
            ask_again = "failed"  # they were selected for that
        return cls(source, loaded, ask_again, confirm, only, ids)

    async def take_over(self, folder: RunFolder, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the records that are taken over into the journal of a run in preparation.

        Args:
            folder: The new run's folder, with its items.
            about: The new run's provenance.

        Returns:
            What to add to the provenance.

        Raises:
            ConfigurationError: One run is simulated and the other is not.
            JournalError: The other run is damaged, or the records cannot be written.
        """
        plan = await take_over(
            [self.source],
            self.loaded,
            folder,
            about,
            ask_again=self.ask_again,
            confirm=self.confirm,
            only=self.only,
        )
        return {"from": plan.to_json() | {"ask_again": self.ask_again}}


def open_source(path: Path) -> RunFolder:
    """Return the folder of a run that a new run extends; blocks.

    Raises:
        ConfigurationError: There is no run, or a session is working on it.
        JournalError: It cannot be read, or has another format.
    """
    source = open_folder(path)
    source.read_provenance()
    if source.is_in_use():
        msg = (
            f"--from {path}: a session is working on this run, and its items in flight would "
            "be paid twice; wait until it ends, or stop it"
        )
        raise ConfigurationError(msg)
    return source


async def take_over(  # noqa: PLR0913 - a run, those that it extends, and how
    sources: Sequence[RunFolder],
    loaded: LoadedConfig,
    folder: RunFolder,
    about: Mapping[str, Any],
    *,
    ask_again: str | None,
    confirm: Callable[[ExtensionPlan], Awaitable[None]] | None = None,
    only: str | None = None,
    run: str | None = None,
) -> ExtensionPlan:
    """Write the records that a run takes over into its journal, while it is in preparation.

    Args:
        sources: The runs whose items are taken over; each item from the first one that has an
            answer to it, or else from the first one in which it failed.
        loaded: The settings of the new run.
        folder: Its folder, with its items.
        about: Its provenance.
        ask_again: Finished items that are asked again; None decides by what has changed.
        confirm: Called with the plan; it raises to stop. None needs no estimate.
        only: Conditions that have selected the items.
        run: Id that the records name as their origin; None is that of the first source.

    Raises:
        ConfigurationError: One run is simulated and the other is not.
        JournalError: Another run is damaged, or the records cannot be written.
    """
    with ExitStack() as stack:
        found = [
            await asyncio.to_thread(_open_source, stack, one, loaded, about, ask_again)
            for one in sources
        ]
        run = run or found[0].run
        plan = ExtensionPlan(run, sources[0].path, bool(about["simulated"]), only=only)
        items = stack.enter_context(await asyncio.to_thread(ItemStore, folder.items))
        matcher = await asyncio.to_thread(_open_matcher, found, items, loaded, about, plan)
        header = {"run": about["run"], "session": f"taken over from run {run}"}
        writer: JournalWriter | None = None
        try:
            for lo in range(0, len(matcher.items), _BATCH):
                for record in await asyncio.to_thread(matcher.match, lo):
                    if writer is None:
                        path = folder.journal / TAKEN_OVER_FILE
                        writer = JournalWriter(path, header, loaded.config.journal.fsync_s)
                    writer.write(record)
        finally:
            if writer is not None:
                await writer.close()
        if confirm is not None:
            await asyncio.to_thread(matcher.finish_plan, loaded, about)
    if confirm is not None:
        await confirm(plan)
    return plan


@dataclass
class _Source:
    """A run whose items may be taken over.

    Attributes:
        run: Its id.
        folder: Its folder.
        journal: Its journal.
        indices: Its items that have not been matched yet, by id.
        total: Number of its items.
        loaded: The settings of the new run.
        ask_again: ``cut``, ``failed`` or ``all``: finished items that are asked again; None decides
            by what has changed.
    """

    run: str
    folder: RunFolder
    journal: Journal
    indices: dict[str, int]
    total: int
    loaded: LoadedConfig
    ask_again: str | None

    @cached_property
    def _failed_again(self) -> str | None:
        """Return which failed items are asked again; most runs have none, and settings are slow."""
        return self.ask_again or _choose_ask_again(self.folder, self.loaded)

    def is_asked_again(self, record: Mapping[str, Any]) -> bool:
        """Return True if a finished item is asked again; blocks."""
        if self.ask_again == "all" or record["status"] == "done":
            return self.ask_again == "all"
        again = self._failed_again
        return again == "failed" or (again == "cut" and _is_truncated(record))


def _open_source(
    stack: ExitStack,
    folder: RunFolder,
    loaded: LoadedConfig,
    about: Mapping[str, Any],
    ask_again: str | None,
) -> _Source:
    before = folder.read_provenance()
    if before["simulated"] is not None and before["simulated"] != about["simulated"]:
        kinds = ("real", "simulated")
        msg = (
            f"--from {folder.path}: its answers are {kinds[before['simulated']]}, and "
            f"these endpoints are {kinds[about['simulated']]}; a run cannot mix them"
        )
        raise ConfigurationError(msg)
    with ItemStore(folder.items) as store:
        indices = {name: index for index, name in enumerate(store.iter_ids())}
    journal = Journal(folder.journal, get_run_ids(before), len(indices))
    stack.enter_context(journal)
    if lost := list_lost_files(folder.journal):
        logger.warning("--from: %s", describe_lost_files(lost, journal))
    return _Source(before["run"], folder, journal, indices, len(indices), loaded, ask_again)


def _open_matcher(
    sources: Sequence[_Source],
    items: ItemStore,
    loaded: LoadedConfig,
    about: Mapping[str, Any],
    plan: ExtensionPlan,
) -> _Matcher:
    config = loaded.config
    prompt = config.parse_prompt()
    return _Matcher(
        items=items,
        sources=sources,
        digests=ItemDigests(
            compute_question_digest(config, about["model"]),
            prompt.constants,
            bytes.fromhex(about["fingerprint"]),
        ),
        build_messages=prompt.build_messages,
        images=open_images(config),
        plan=plan,
    )


def _select_items(source: RunFolder, only: str) -> tuple[Selection, frozenset[str]]:
    """Return the conditions, and the ids of the rows of a run whose finished items fulfil them.

    With samples, the folded answer counts, and ``failed`` selects rows of which any sample failed.

    Raises:
        ConfigurationError: The conditions cannot be read, or no item fulfils them.
    """
    about = source.read_provenance()
    task = get_at_path(read_settings(source.settings).data, ("task",))
    with (
        ItemStore(source.items) as store,
        Journal(source.journal, get_run_ids(about), len(store)) as journal,
    ):
        task = task if isinstance(task, Mapping) else {}
        schema, fold = task.get("schema"), SampleFold.from_task(task)
        answer = schema if isinstance(schema, Mapping) else None
        answer = answer if fold is None else fold.fold_schema(answer)
        try:
            selection = Selection.parse(only, answer, describe_columns(store.types))
        except ConfigurationError as error:
            raise ConfigurationError(f"--only: {error.message}") from None
        ended = [index for index in range(len(store)) if journal.is_finished(index)]
        rows = store.iter_rows(ended)
        ids = set[str]()
        for _, indices in groupby(ended, lambda index: index // store.samples):
            records = [journal.read_record(index) for index in indices]
            (row, _), *_others = [next(rows) for _ in records]
            outputs = [record.get("output") for record in records if record["status"] == "done"]
            output = fold.fold(outputs).output if fold is not None else next(iter(outputs), None)
            if any(selection.holds(record["status"], output, row) for record in records):
                ids.add(find_row_id(str(records[0]["id"]), records[0]["sample"]))
    if not ids:
        msg = f"--only {only!r}: none of the {len(ended):,} finished items of {source.path} fits"
        raise ConfigurationError(msg)
    return selection, frozenset(ids)


def _choose_ask_again(source: RunFolder, loaded: LoadedConfig) -> str | None:
    """Return which failed items may end otherwise, by the settings that have changed."""
    old, new = read_settings(source.settings).data, loaded.plain
    limits = [(one.get("model") or {}).get("max_tokens") for one in (old, new)]
    if any(_get_deciding(old, name) != _get_deciding(new, name) for name in _DECIDING):
        return "failed"
    before, now = limits
    return "cut" if isinstance(before, int) and isinstance(now, int) and now > before else None


def _get_deciding(settings: Mapping[str, Any], section: str) -> Any:
    found = settings.get(section)
    if section not in _NO_EFFECT or not isinstance(found, Mapping):
        return found
    return {key: value for key, value in found.items() if key not in _NO_EFFECT[section]}


def _is_truncated(record: Mapping[str, Any]) -> bool:
    return record.get("error_class") == TruncatedAnswerError.__name__


@dataclass(slots=True)
class _Matcher:
    """Finds the items of a new run among those of others.

    Attributes:
        items: The items of the new run.
        sources: The other runs.
        digests: Digests of the new run's items.
        build_messages: Returns the first messages of an item from its columns.
        images: Reads the images of an item, or None.
        plan: What has been found so far.
        prompts: Estimated tokens of the prompts to ask.
        measured: Tokens of finished prompts with the same question, as their servers counted them.
        estimated: Their estimate.
        truncated: Finished items to ask again whose answers were truncated.
    """

    items: ItemStore
    sources: Sequence[_Source]
    digests: ItemDigests
    build_messages: Callable[[Row], list[Message]]
    images: ImageFolder | None
    plan: ExtensionPlan
    prompts: array[float] = field(default_factory=lambda: array("d"))
    measured: int = 0
    estimated: float = 0.0
    truncated: int = 0

    def match(self, lo: int) -> list[dict[str, Json]]:
        """Return the records to take over for the items from ``lo``, as many as a batch has."""
        some = self.items.read(lo, min(len(self.items), lo + _BATCH))
        return list(self._iter_kept(some))

    def _iter_kept(self, items: list[Item]) -> Iterator[dict[str, Json]]:
        for item in items:
            indices = [source.indices.pop(item.id, None) for source in self.sources]
            rendered = self._render(item)
            if rendered is None:
                self.plan.invalid += 1
                continue
            messages, question = rendered
            record, is_kept = self._find_record(indices, question)
            if record is not None and self.estimated < _CALIBRATION_TOKENS:
                self._compare_tokens(record, messages)
            if record is not None and is_kept:
                yield self._adopt(record, item)
            else:
                tokens = estimate_prompt_tokens({"messages": messages}) * LIKELY_SHARE
                self.prompts.append(tokens)

    def _compare_tokens(self, record: Mapping[str, Any], messages: list[Message]) -> None:
        """Note the tokens of a prompt as its server counted them, beside their estimate."""
        tokens = record.get("prompt_tokens")
        if record.get("requests") == 1 and not record.get("lost_tokens") and tokens:
            self.measured += tokens
            self.estimated += estimate_prompt_tokens({"messages": messages}) * LIKELY_SHARE

    def _render(self, item: Item) -> tuple[list[Message], str | None] | None:
        """Return the first messages of an item and the digest of its question.

        Returns:
            None if it fails without a request.
        """
        if item.problem is not None:
            return None
        try:
            messages = self.build_messages(item.row)
            images = [] if self.images is None else self.images.load(item.row)
        except InvalidItemError:
            return None
        told = [image.describe() for image in images]
        question = self.digests.compute_question(messages, item.sample, told)
        return add_images(messages, images), question

    def _find_record(
        self, indices: Sequence[int | None], question: str | None
    ) -> tuple[dict[str, Any] | None, bool]:
        """Return the record of an item with the same question, and whether it is taken over.

        An answer comes before a failure. An item that is asked is counted by its reason.

        Args:
            indices: The index of the item in each of the other runs, or None.
            question: Digest of its question.
        """
        plan = self.plan
        failed: dict[str, Any] | None = None
        again: dict[str, Any] | None = None
        is_known = is_unfinished = False
        for source, index in zip(self.sources, indices, strict=True):
            if index is None:
                continue
            if not source.journal.is_finished(index):
                is_unfinished = True
                continue
            is_known = True
            record = source.journal.read_record(index)
            is_same = record.get("question") == question
            if not is_same or bool(record.get("simulated")) != plan.simulated:
                continue
            if source.is_asked_again(record):
                again = again or record
            elif record["status"] == "done":
                plan.done += 1
                return record, True
            else:
                failed = failed or record
        if failed is not None:
            plan.failed += 1
            return failed, True
        if again is not None:
            plan.again += 1
            self.truncated += _is_truncated(again)
        elif is_known:
            plan.changed += 1
        elif is_unfinished:
            plan.unfinished += 1
        else:
            plan.new += 1
        return again, False

    def _adopt(self, record: dict[str, Any], item: Item) -> dict[str, Json]:
        """Return the record of an item that this run did not ask: it cost nothing here."""
        counts = ("requests", "repairs", "prompt_tokens", "cached_tokens", "completion_tokens")
        costs = ("lost_tokens", "useful_tokens", "nano_usd", "useful_nano_usd")
        kept = {key: value for key, value in record.items() if key != "shares"}
        return kept | {
            "index": item.index,
            "sample": item.sample,
            "attempts": [],
            "reused": int(record["status"] == "done"),
            **dict.fromkeys((*counts, *costs), 0),
            "fingerprint": self.digests.compute_fingerprint(item),
            "origin": record.get("origin") or self.plan.run,
        }

    def finish_plan(self, loaded: LoadedConfig, about: Mapping[str, Any]) -> None:
        """Add the estimate to the plan, by the measurements of the first of the other runs."""
        plan, config, source = self.plan, loaded.config, self.sources[0]
        plan.dropped = len(source.indices)
        if plan.asked:
            ratio = self.measured / self.estimated if self.measured else 1.0
            first = Range.from_sample(self.prompts, plan.asked).map(lambda tokens: ratio * tokens)
            nodes = count_nodes(config, ())
            plan.plan = make_run_plan(config, plan.asked, first, read_price(about), nodes)
            limit = self._find_limit(config)
            measured = measure_items(source.journal, source.total, plan.path, limit)
            plan.forecast = forecast(plan.plan, measured)

    def _find_limit(self, config: RunConfig) -> AnswerLimit:
        """Return the limit of answers, and the share of truncated ones among what is asked."""
        journal = self.sources[0].journal
        cut = journal.count_failures().get(TruncatedAnswerError.__name__, 0)
        counts = journal.count_items()
        like_all = (self.plan.asked - self.plan.again) * cut / max(1, counts.done + counts.failed)
        share = (self.truncated + like_all) / max(1, self.plan.asked)
        return AnswerLimit(config.model.max_tokens, share)
