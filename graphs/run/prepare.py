"""Create a run folder, or check that settings fit an existing one."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ...backends.budget.pricing import find_model_price
from ...backends.core.aio import call_stoppable
from ...backends.core.errors import (
    ConfigurationError,
    JournalError,
)
from ...backends.core.fields import split_column
from ...backends.core.secrets import mask_arguments
from ...backends.discovery.connect import ReadyEndpoints, check_cache, check_endpoints
from ...backends.discovery.node_local import ready_endpoints
from ...backends.inputs.base import InputSummary
from ...backends.inputs.formats import is_present, needed_columns
from ...backends.simulated.process import make_simulation_spec
from ...backends.storage.run_folder import (
    RunFolder,
    StagePlace,
    create_folder,
    get_folder_identity,
    get_own_ids,
    get_run_ids,
    is_vacant,
    place_to_be,
    read_file_stamp,
    utc_timestamp,
    write_bytes,
)
from ...configs.aggregators import FinalReducerConfig
from ...configs.base import expand_home
from ...configs.loader import LoadedConfig, load_config, make_portable
from ...configs.models import InputConfig, RunConfig
from ...configs.preset_files import is_preset
from ...configs.serialize import find_lost_secrets
from ...configs.yaml_text import to_yaml
from .fingerprint import compute_fingerprint, diff_settings
from .input_check import check_fields, check_input_setting, check_requests

if TYPE_CHECKING:
    from ...backends.inputs.item_store import EntrySource
    from .pipeline_resources import PipelineResources

logger = logging.getLogger(__name__)


def ensure_run_identity(folder: RunFolder) -> dict[str, Any]:
    """Return the provenance of a run; a copied folder becomes a separate run. Blocks.

    The copy gets a new run id, so that it shares neither checkpoints nor tasks with the run that it
    was copied from. It keeps the journal and the spend logs of the earlier id. Tasks that the other
    run left at Globus Compute are removed here, because that run follows them. Checkpoints are
    removed too: they may have been copied during a write, and the journal has everything. The
    caller holds the run's lock.

    A folder moved from another file system is treated as a copy, which is harmless.

    Raises:
        JournalError: The folder cannot be read or written.
    """
    about, place = folder.read_provenance(), get_folder_identity(folder.path)
    if about.get("place") == place:
        return about
    from ...backends.workers.globus.tasks import TASK_LOG_FILE  # noqa: PLC0415 - few runs move

    checkpoints = folder.checkpoints
    try:
        for end in ("", "-wal", "-shm", "-journal"):
            checkpoints.with_name(f"{checkpoints.name}{end}").unlink(missing_ok=True)
        (folder.path / TASK_LOG_FILE).unlink(missing_ok=True)
    except OSError as error:
        msg = f"{folder.path}: cannot remove files that a copied run must not keep: {error}"
        raise JournalError(msg) from error
    ids, own = get_run_ids(about), list[str]()
    if about.get("place", {}).get("inode") == place["inode"]:
        own = [*get_own_ids(about)]  # only the number of its file system has changed
    about |= {"run": secrets.token_hex(8), "earlier": [*ids], "own": own, "place": place}
    folder.write_provenance(about)  # written last: until then the folder counts as a copy
    logger.warning(
        "%s: copied from the folder of run %s, or moved from another file system; it continues as "
        "run %s, without the tasks of the other run",
        folder.path,
        ids[0],
        about["run"],
    )
    return about


RUNS_FOLDER: Final = "fanfold-runs"


def default_run_folder(name: str) -> Path:
    """Return a folder for a new run in the working directory."""
    return Path(RUNS_FOLDER) / new_folder_name(name)


def new_folder_name(name: str) -> str:
    """Return a unique folder name for a new run."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return f"{name}-{stamp}-{secrets.token_hex(2)}"


@dataclass(frozen=True, slots=True)
class ReadyRun:
    """A run that was checked, so that a session can open it.

    Attributes:
        folder: Its folder.
        loaded: The settings of the session.
        reduce_changed: True if the aggregators differ from those in the checkpoints.
        endpoints: The endpoints that were probed for the check; None if there was no need.
        resources: What it shares with other runs of its pipeline; None for a run of its own.
        is_begun: Whether its provenance names the session that is to come.
    """

    folder: RunFolder
    loaded: LoadedConfig
    reduce_changed: bool = False
    endpoints: ReadyEndpoints | None = None
    resources: PipelineResources | None = None
    is_begun: bool = False


ExtendRun: TypeAlias = Callable[[RunFolder, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Fills the journal of a run in preparation; gets its provenance, returns what to add to it."""


def check_single_task(loaded: LoadedConfig) -> None:
    """Check that the settings have one task, and no stages.

    Raises:
        ConfigurationError: They are those of a pipeline.
    """
    if loaded.config.stages is not None:
        msg = (
            f"{loaded.source}: settings with stages run by 'fanfold run' and 'fanfold submit', and "
            "in graphs; batch and agents' tools take a single task"
        )
        raise ConfigurationError(msg)


async def prepare_run(  # noqa: PLR0913 - each is given by one kind of caller
    loaded: LoadedConfig,
    path: Path,
    items: Sequence[Mapping[str, Any]] | None = None,
    allow_simulated: bool = True,
    defer_endpoints: bool = False,
    *,
    extend: ExtendRun | None = None,
    only: Collection[str] | None = None,
    source: EntrySource | None = None,
    place: StagePlace | None = None,
    probed: ReadyEndpoints | None = None,
) -> ReadyRun:
    """Check input and endpoints, and create the run folder.

    Args:
        loaded: The settings.
        path: The folder to create.
        items: Items that replace the configured input.
        allow_simulated: Allow a simulated fleet.
        defer_endpoints: Do not check the endpoints, because a job will start them.
        extend: Takes over items of another run before the folder appears under its name.
        only: Ids of the rows of the run; None means all of the input.
        source: Items in place of the configured input that have their ids already.
        place: Place of the run in a pipeline.
        probed: The endpoints if they were just probed; None probes them.

    Raises:
        ConfigurationError: A setting or the input is wrong; no folder is left behind.
    """
    from ...backends.inputs.item_store import (  # noqa: PLC0415 - pyarrow is slow to import
        load_input,
        load_rows,
    )
    from .order import store_order  # noqa: PLC0415 - as above
    from .part_length import check_part_lengths  # noqa: PLC0415 - as above

    check_single_task(loaded)
    if source is None:
        check_input_setting(loaded, items)
    if loaded.config.task.graph is not None:
        from .item_engine import check_item_graph  # noqa: PLC0415 - imports LangGraph

        check_item_graph(loaded.config)
    if not defer_endpoints and probed is None:
        check_endpoints(loaded)
    async with _create_folder(path, loaded.config) as folder:
        given, columns = loaded.config.input, needed_columns(loaded.config)
        samples = loaded.config.task.samples
        if source is not None:
            summary = await asyncio.to_thread(load_rows, folder.items, source, samples)
        else:
            summary = await call_stoppable(
                load_input, given, folder.items, columns, items, only=only, samples=samples
            )
        check_fields(loaded, summary)
        await _check_final_reducers(loaded, folder)
        model, simulated, ready = await _resolve_model(loaded, defer_endpoints, probed)
        if loaded.config.backend.is_batch and ready is not None:
            from ...backends.batch.transport import get_deployment  # noqa: PLC0415 - as above

            get_deployment(ready)
        if simulated and not allow_simulated:
            msg = (
                "the endpoints are a simulated fleet, whose answers are meaningless; no request "
                "was sent"
            )
            raise ConfigurationError(msg)

        def describe() -> dict[str, Any]:
            _check_stored_requests(loaded.config, ready, folder.items)
            order = store_order(folder, loaded.config)
            cost = find_model_price(loaded.config, model, bool(simulated))
            return {
                "run": secrets.token_hex(8),
                "earlier": [],
                "place": place_to_be(folder),
                "name": loaded.config.name,
                "config": loaded.source,
                "simulated": simulated,
                "model": model,
                "price": cost.to_json() if cost is not None else None,
                "fingerprint": compute_fingerprint(loaded.config, model, simulated),
                "input": describe_input(
                    summary, given.path if items is None and source is None else None
                ),
                "order": order,
                "sessions": [],
            }

        if ready is not None and source is None:  # else they are split further when refused
            await check_part_lengths(loaded.config, ready, folder.items)
        about = await asyncio.to_thread(describe)
        if extend is not None:
            about |= await extend(folder, about)
        await asyncio.to_thread(_write, folder, path, loaded, about, place)
    return ReadyRun(RunFolder(path), loaded, endpoints=ready)


@asynccontextmanager
async def _create_folder(path: Path, config: RunConfig) -> AsyncIterator[RunFolder]:
    """Check what is on disk, and create a run folder, in a thread; remove it if the block fails."""
    making = create_folder(path)

    def begin() -> RunFolder:
        if not is_vacant(path):
            raise ConfigurationError(f"{path}: contains other files; choose another --out")
        check_cache(config)
        if config.backend.is_batch:
            from ...backends.batch.files import check_batch_settings  # noqa: PLC0415 - rarely used

            check_batch_settings(config.backend)
        return making.__enter__()

    folder = await asyncio.to_thread(begin)
    try:
        yield folder
    except BaseException as error:
        await asyncio.to_thread(making.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(making.__exit__, None, None, None)


async def _resolve_model(
    loaded: LoadedConfig, defer_endpoints: bool, probed: ReadyEndpoints | None
) -> tuple[str, bool | None, ReadyEndpoints | None]:
    """Return the model's name, whether the endpoints are simulated, and the endpoints if probed.

    None in place of the second means that it is not known yet.
    """
    if defer_endpoints:
        return loaded.config.model.name or "", None, None
    if loaded.config.endpoints.simulated is not None:
        return make_simulation_spec(loaded.config).model, True, None
    if probed is not None:
        return probed.model, probed.simulated, probed
    async with ready_endpoints(loaded.config, loaded.plain["endpoints"]) as ready:
        return ready.model, ready.simulated, ready


def _write(
    folder: RunFolder,
    path: Path,
    loaded: LoadedConfig,
    about: dict[str, Any],
    place: StagePlace | None,
) -> None:
    if place is not None:
        folder.write_place(place)
    write_bytes(folder.settings, to_yaml(make_portable(loaded.plain, path)).encode())
    folder.write_provenance(about)


def describe_input(summary: InputSummary, path: str | None) -> dict[str, Any]:
    """Return the provenance entry of the input."""
    return {
        "source": summary.source,
        "items": summary.items,
        **({"samples": summary.samples} if summary.samples > 1 else {}),
        "digest": summary.digest,
        "stamp": None if path is None else read_file_stamp(Path(path)),
        "invalid": summary.invalid,
        "skipped_total": summary.skipped_total,
        "skipped": [{"id": s.id, "reason": s.reason} for s in summary.skipped],
    }


_BLANK: Final = re.compile(r"\s")
FOLDER_PLACEHOLDER: Final = Path("DIR")
"""Placeholder for the run folder in a recorded command."""
_PACKAGES: Final = ("fanfold", "langgraph", "langchain-core", "langchain-openai", "pydantic")


def begin_session(folder: RunFolder) -> None:
    """Record that this process starts a session of a run that it has locked; blocks."""
    about = ensure_run_identity(folder)
    folder.write_provenance(about | {"sessions": [*about["sessions"], describe_session(folder)]})


def end_session(folder: RunFolder) -> None:
    """Record the end of the session and of the run; blocks.

    A graph that resumes from a checkpoint has not recorded its start; both are recorded then.
    """
    about = folder.read_provenance()
    sessions = about["sessions"]
    begun = bool(sessions) and sessions[-1]["ended"] is None and sessions[-1]["pid"] == os.getpid()
    *before, last = sessions if begun else [*sessions, describe_session(folder)]
    last |= {"ended": utc_timestamp(), "outcome": "finished"}
    folder.write_provenance(about | {"sessions": [*before, last]})


def describe_session(folder: RunFolder) -> dict[str, Any]:
    """Return the provenance entry of a session in this process.

    Args:
        folder: The run's folder, replaced in the command by ``FOLDER_PLACEHOLDER``.
    """
    return {
        "started": utc_timestamp(),
        "ended": None,
        "outcome": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": dict(_read_versions()),
        "command": [
            "fanfold" if (name := Path(sys.argv[0]).name) == "__main__.py" else name,
            *mask_arguments(_strip_folder(sys.argv[1:], folder.path)),
        ],
        "git": {"fanfold": _own_commit(), "workdir": _commit(Path.cwd())},
    }


@cache
def _read_versions() -> Mapping[str, str]:
    """Return the versions of the main packages; read once, for all levels of a pipeline."""
    return {name: version(name) for name in _PACKAGES}


def _strip_folder(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield the command's arguments, with the path of the folder replaced by a placeholder."""
    own = folder.resolve()
    for number, argument in enumerate(arguments):
        is_command = number == 0 and argument.isalpha()
        is_preset_name = (
            arguments[0] == "run" and arguments[number - 1] != "--out" and is_preset(argument)
        )
        if is_command or is_preset_name:  # also beside a folder of that name
            yield argument
            continue
        *key, text = argument.rsplit("=", 1)  # --out=DIR, --set cache=DIR/answers
        if "://" not in text and _may_be_path(text):
            place = expand_home(text).resolve()
            text = (
                str(FOLDER_PLACEHOLDER / place.relative_to(own))
                if place.is_relative_to(own)
                else text
            )
        for spelling in {str(own), str(folder.absolute())}:
            text = re.sub(rf"{re.escape(spelling)}(?![\w.-])", str(FOLDER_PLACEHOLDER), text)
        yield "=".join((*key, text))


def _may_be_path(text: str) -> bool:
    try:
        return ("/" in text and not _BLANK.search(text)) or (text != "" and Path(text).exists())
    except (OSError, ValueError):  # the name is too long, or contains a NUL
        return False


def _commit(folder: Path) -> str | None:
    """Return the commit of a folder, with ``+`` if files differ; None outside git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git: provenance records None
    return found.stdout.strip() or None


def _own_commit() -> str | None:
    """Return fanfold's own commit; None for an installed wheel, even inside a checkout."""
    root = Path(__file__).resolve().parents[2]
    return _commit(root) if (root / ".git").exists() else None


_CHECKED_LATER: Final = ("node.env.", "node.serve", "backend.user_endpoint_config.")


async def resume_run(folder: RunFolder, loaded: LoadedConfig | None) -> ReadyRun:
    """Check that settings fit an existing run, and write them to its folder.

    A copied folder gets a new run id.

    Args:
        folder: The run's folder.
        loaded: The settings to resume with; None uses those of the run.

    Raises:
        ConfigurationError: The settings do not fit the run; the message lists the differences.
    """
    before = load_config(folder.settings)
    after = loaded or before
    about = await asyncio.to_thread(folder.read_provenance)
    await call_stoppable(check_settings_fit, folder, about, after, before)
    ready: ReadyEndpoints | None = None
    if about["simulated"] is not None and after.plain["endpoints"] != before.plain["endpoints"]:
        ready = await _check_simulated(folder, about, after)
    changed = before.plain["reduce"] != after.plain["reduce"] or _get_fold(before) != _get_fold(
        after
    )
    if changed:
        await _check_final_reducers(after, folder)
    if after.plain != before.plain:
        await asyncio.to_thread(_write_changed, folder, about, after)
    if about.get("place") != await asyncio.to_thread(get_folder_identity, folder.path):
        await asyncio.to_thread(_ensure_identity_locked, folder)
    return ReadyRun(folder, after, changed, ready)


def _get_fold(loaded: LoadedConfig) -> Any:
    return loaded.config.task.fold


def _check_secrets(folder: RunFolder, after: LoadedConfig) -> None:
    """Check that every secret that the run folder does not keep is given.

    Secrets of endpoints, servers and engines are checked where they are used.
    """
    data = after.config.model_dump(by_alias=True)
    for path in find_lost_secrets(data):
        if not path.startswith(_CHECKED_LATER):
            msg = (
                f"{folder.path}: {path}: a run folder does not keep a secret that was written out; "
                f"set it again, preferably by a variable: --set '{path}=${{VAR}}'"
            )
            raise ConfigurationError(msg)


def _write_changed(folder: RunFolder, about: dict[str, Any], after: LoadedConfig) -> None:
    """Write changed settings, unless another process uses the run."""
    cost = find_model_price(after.config, about["model"], bool(about["simulated"]))
    kept = {"price": None if cost is None else cost.to_json()}
    with folder.lock():
        write_bytes(folder.settings, to_yaml(make_portable(after.plain, folder.path)).encode())
        folder.write_provenance(folder.read_provenance() | kept)


def _ensure_identity_locked(folder: RunFolder) -> None:
    with folder.lock():
        ensure_run_identity(folder)


def check_settings_fit(
    folder: RunFolder,
    about: Mapping[str, Any],
    after: LoadedConfig,
    before: LoadedConfig | None = None,
) -> None:
    """Check that settings fit an existing run, as far as that shows without its endpoints; blocks.

    Args:
        folder: The run's folder.
        about: Its provenance.
        after: The settings to resume with.
        before: The settings of the run; None reads them.

    Raises:
        ConfigurationError: They do not fit; the message lists the differences.
    """
    before = before or load_config(folder.settings)
    _check_secrets(folder, after)
    lines = diff_settings(before.plain, after.plain, about["model"])
    if after.config.endpoints.simulated is not None and about["simulated"] is False:
        lines.append("endpoints: real → simulated; a run cannot mix their answers")
    if not lines and _has_input_changed(folder, about, before, after):
        lines.append(f"input: the content of {after.config.input.path} changed")
    if (
        not lines
        and compute_fingerprint(after.config, about["model"], about["simulated"])
        != (about["fingerprint"])
    ):
        lines.append("task or model: the value of a ${VAR} changed")
    if lines:
        raise ConfigurationError(_difference_message(folder, after, lines))
    _check_columns(folder, after)


def _difference_message(folder: RunFolder, after: LoadedConfig, lines: list[str]) -> str:
    shown = "\n  ".join(lines)
    kept = ""
    mixed = any(line.startswith("endpoints:") for line in lines)
    if not mixed and after.config.input.format != "openai_batch" and folder.read_place() is None:
        source = shlex.quote(str(folder.path))
        kept = f" (with --from {source} it takes over the answers that are still valid)"
    return (
        f"{folder.path}: the settings differ from those of this run; use a new run folder{kept}. "
        f"Differences (run → now):\n  {shown}"
    )


def _check_stored_requests(config: RunConfig, ready: ReadyEndpoints | None, items: Path) -> None:
    from ...backends.inputs.item_store import ItemStore  # noqa: PLC0415 - as above

    if ready is not None:
        with ItemStore(items) as store:
            check_requests(config, ready, store)


async def _check_final_reducers(loaded: LoadedConfig, folder: RunFolder) -> None:
    """Check queries and functions in ``reduce`` against the columns of the results."""
    if not any(isinstance(one, FinalReducerConfig) for one in loaded.config.reduce):
        return
    from .final_reducers import (  # noqa: PLC0415 - pyarrow is slow to import
        check_final_reducers,
        read_layout,
    )

    await check_final_reducers(loaded, await asyncio.to_thread(read_layout, loaded, folder))


def _check_columns(folder: RunFolder, after: LoadedConfig) -> None:
    """Check that the copy of the input has the columns that the aggregators use."""
    from ...backends.inputs.item_store import ItemStore  # noqa: PLC0415 - pyarrow is slow to import

    with ItemStore(folder.items) as store:
        summary = store.summary()
    for name in needed_columns(after.config):
        if split_column(name, summary.columns) is None:
            msg = (
                f"{folder.path}: the run's copy of the input has no column {name!r}, which "
                f"reduce shows; its columns: {', '.join(summary.columns)}"
            )
            raise ConfigurationError(msg)
    check_fields(after, summary)


async def _check_simulated(
    folder: RunFolder, about: dict[str, Any], after: LoadedConfig
) -> ReadyEndpoints | None:
    """Check that new endpoints serve the run's model, and are simulated only if the run is.

    Returns:
        The endpoints; None for a simulated fleet, which is not started here.
    """
    if after.config.endpoints.simulated is not None:
        make_simulation_spec(after.config)
        return None
    async with ready_endpoints(after.config, after.plain["endpoints"], about["model"]) as ready:
        if ready.simulated != about["simulated"]:
            kinds = ("real", "simulated")
            change = f"{kinds[about['simulated']]} → {kinds[ready.simulated]}"
            line = f"endpoints: {change}; a run cannot mix their answers"
            raise ConfigurationError(_difference_message(folder, after, [line]))
        return ready


def _has_input_changed(
    folder: RunFolder, about: Mapping[str, Any], before: LoadedConfig, after: LoadedConfig
) -> bool:
    """Return True if the input's content changed; equal size and time skip the comparison.

    A missing file does not matter, because the run folder has a copy; a new path must exist. Of a
    run that has a selection of the input, only the selected items are compared.
    """
    from ...backends.inputs.item_store import ItemStore  # noqa: PLC0415 - pyarrow is slow to import

    known = about["input"]
    path, same = after.config.input.path, before.plain["input"] == after.plain["input"]
    if path is None or (same and not is_present(Path(path))):
        return False
    if same and known["stamp"] is not None and read_file_stamp(Path(path)) == known["stamp"]:
        return False
    only = None
    if (about.get("from") or {}).get("only") is not None:
        with ItemStore(folder.items) as store:
            only = frozenset(store.iter_ids())
    columns = needed_columns(after.config)
    return _compute_digest(after.config.input, columns, only) != str(known["digest"])


def has_file_changed(
    given: InputConfig, columns: Collection[str], known: Mapping[str, Any]
) -> bool:
    """Return True if the file of an input is there, and has other rows than before; blocks.

    Args:
        given: The settings of the input.
        columns: Columns that are needed.
        known: The entry ``input`` of a provenance.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    path, stamp = given.path, known["stamp"]
    if path is None or stamp is None or not is_present(Path(path)):
        return False
    return read_file_stamp(Path(path)) != stamp and (
        _compute_digest(given, columns, None) != str(known["digest"])
    )


def _compute_digest(
    given: InputConfig, columns: Collection[str], only: Collection[str] | None
) -> str:
    from ...backends.inputs.item_store import load_input  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "items.arrow"
        digest: str = load_input(given, target, columns, only=only).digest
    return digest
