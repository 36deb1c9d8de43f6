"""Pipelines on the command line: run and resume them, and find the folder of a stage."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...backends.budget.cost import describe_cost, read_budget
from ...backends.core.errors import (
    EXIT_BUDGET,
    EXIT_INTERRUPTED,
    ConfigurationError,
)
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import (
    RunFolder,
    get_run_ids,
    is_vacant,
    open_folder,
    read_aggregate,
)
from ...configs.loader import LoadedConfig, load_config
from ...configs.overrides import Overrides
from ..pipeline import PipelineResult, execute_pipeline
from ..run.checkpoints import check_saver
from ..run.console import print_json, print_messages
from ..run.extend_pipeline import PipelineExtension
from ..run.pipeline import find_stage_warnings, list_stages, prepare_pipeline, write_settings
from ..run.pipeline_report import StageState, describe_stages, list_raise_options
from ..run.rich_console import Terminal, open_message_console
from ..run.shutdown import session_deadline, with_deadline
from ..session import RunOptions
from .extend import check_ask_again, is_interactive, make_pipeline_confirmation
from .format import input_lines
from .options import OutputMode
from .stage_findings import show_pipeline_findings


def check_pipeline_options(overrides: Overrides) -> None:
    """Check that a command has no option that is for single runs.

    Raises:
        ConfigurationError: It has one.
    """
    given = {
        "--pilot": (
            overrides.pilot is not None,
            "run the first items in a folder of their own (--limit 20); fanfold check estimates "
            "all stages",
        ),
        "--only": (
            overrides.only is not None,
            "select the items of a stage by its where",
        ),
        "--retry-failed": (
            overrides.retry_failed,
            "later stages have used the results without the failed items. Start a new run that "
            "takes over the answers of this one: fanfold run SETTINGS --from DIR --ask-again "
            "failed",
        ),
    }
    for option, (is_given, advice) in given.items():
        if is_given:
            msg = f"{option} is for a single task, and these settings have stages: {advice}"
            raise ConfigurationError(msg)


async def pipeline_session(
    path: Path, loaded: LoadedConfig | None, overrides: Overrides, output: OutputMode
) -> PipelineResult:
    """Run one session of a pipeline: create its folder, or resume the one that is there.

    Args:
        path: The folder.
        loaded: The settings; None takes those of the pipeline.
        overrides: Options of the command.
        output: How the command prints.

    Raises:
        ConfigurationError: The settings are wrong, or do not fit what was done so far.
    """
    began = time.time()
    check_pipeline_options(overrides)
    await check_saver(overrides.checkpointer)
    if loaded is not None and is_vacant(path):
        end = session_deadline(loaded.config, began)
        extension = await _open_extension(loaded, overrides, output)
        folder = await with_deadline(prepare_pipeline(loaded, path, extension=extension), end)
        if not output.quiet:
            found = folder.read_provenance()["input"]
            names = ", ".join(stage.name for stage in loaded.config.stages or ())
            items = count_nouns(found["items"], "item")
            print_messages(
                [
                    f"{items} from {found['source']}; stages {names}; run folder {folder.path}",
                    *input_lines(found),
                    *find_stage_warnings(loaded),
                ]
            )
    else:
        folder = open_folder(path)
        if not folder.is_pipeline:
            msg = f"{path}: this is a single run, but the settings have stages; use a new folder"
            raise ConfigurationError(msg)
        if overrides.extends is not None:
            await asyncio.to_thread(_note_source, folder, overrides.extends, overrides.ask_again)
        if loaded is None:
            loaded = await asyncio.to_thread(load_config, folder.settings)
        else:
            await asyncio.to_thread(write_settings, folder, loaded)
        end = session_deadline(loaded.config, began)
        if overrides.budget_assignments:  # the latest setting counts
            await asyncio.to_thread(folder.raised_limits.unlink, missing_ok=True)
    options = RunOptions(
        overrides.checkpointer, overrides.trace, quiet=output.is_silent, deadline=end
    )
    return await execute_pipeline(folder, loaded, options, open_message_console())


async def _open_extension(
    loaded: LoadedConfig, overrides: Overrides, output: OutputMode
) -> PipelineExtension | None:
    """Return the pipeline that a new one extends, or None.

    Raises:
        ConfigurationError: It cannot be extended.
    """
    if overrides.extends is None:
        return None
    asks = is_interactive() and not output.as_json
    stages = {
        stage.name: stage.loaded.config.endpoints.simulated is not None
        for stage in list_stages(loaded, Path())
    }
    confirm = make_pipeline_confirmation(loaded, overrides.yes, asks)
    return await asyncio.to_thread(
        PipelineExtension.open, overrides.extends, stages, overrides.ask_again, confirm
    )


def _note_source(folder: RunFolder, source: Path, ask_again: str | None) -> None:
    """Check that an existing pipeline extends the one that is named, and note where that is.

    Raises:
        ConfigurationError: It does not, or asks other items again.
    """
    about = folder.read_provenance()
    known = about.get("from")
    check_ask_again(folder, known, ask_again)
    if known is not None and not source.exists():
        return
    found = open_folder(source).read_provenance()
    if known is None or known["run"] not in get_run_ids(found):
        msg = (
            f"{folder.path}: this pipeline exists and does not extend {source}; --from begins a "
            "new one: choose another --out"
        )
        raise ConfigurationError(msg)
    if known["path"] != str(source.resolve()):
        with folder.lock():
            moved = known | {"path": str(source.resolve())}
            folder.write_provenance(folder.read_provenance() | {"from": moved})


def print_pipeline_result(result: PipelineResult, output: OutputMode) -> int:
    """Print how a session of a pipeline ended; return the exit code."""
    last = result.state.last
    budget = read_budget(result.folder, result.state.cost)
    if output.as_json:
        print_json(
            {
                "run": result.run_id,
                "folder": str(result.folder.path),
                "simulated": result.simulated,
                "stages": [stage.to_json() for stage in result.state.stages],
                **result.state.cost.to_json(),
                "budget": budget,
                "seconds": result.seconds,
                "aggregate": read_aggregate(last.stage.folder),
                "exit_code": result.exit_code,
            }
        )
        return result.exit_code
    if not output.quiet:
        show_pipeline_findings(result.state, result.simulated, Terminal())
    print_messages(list(_last_lines(result, last, budget)))
    return result.exit_code


def _last_lines(result: PipelineResult, last: StageState, budget: dict[str, Any]) -> Iterator[str]:
    if result.simulated:
        yield "SIMULATED"
    yield from describe_stages(result.state)
    yield f"{result.seconds:,.1f} s"
    yield from describe_cost(result.state.cost, budget)
    path = shlex.quote(str(result.folder.path))
    if result.exit_code == EXIT_BUDGET:
        options = " ".join(list_raise_options(result.state, budget))
        yield f"Paused in stage {last.stage.name}: {result.reason}"
        yield f"Resume with a higher limit: fanfold resume {path} {options}".rstrip()
    elif result.exit_code == EXIT_INTERRUPTED:
        yield f"Interrupted in stage {last.stage.name}: {result.reason}"
        yield f"Resume with: fanfold resume {path}"
    else:
        yield f"Results of stage {last.stage.name}: {last.stage.folder.results}"
        if result.state.failed:
            yield f"Failed items, with remedies and examples: fanfold failures {path}"
