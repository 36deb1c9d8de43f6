"""``fanfold run`` and ``fanfold resume``, with or without a pilot."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ...backends.core.errors import (
    EXIT_INTERRUPTED,
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
)
from ...backends.core.money import NANO_PER_USD
from ...backends.core.terminal import count_nouns
from ...backends.storage.run_folder import RunFolder, get_run_ids, is_vacant, open_folder
from ...configs.loader import LoadedConfig
from ...configs.overrides import Overrides
from ..run.checkpoints import check_saver
from ..run.console import print_json, print_messages
from ..run.extend import Extension
from ..run.next_steps import truncated_notice
from ..run.prepare import ReadyRun, default_run_folder, prepare_run, resume_run
from ..run.rich_console import open_message_console
from ..run.run_result import RunResult
from ..run.shutdown import WARNING_SIGNALS, session_deadline, with_deadline
from ..session import PilotResult, RunOptions, execute_run, run_pilot
from .extend import check_ask_again, is_interactive, make_confirmation
from .format import (
    budget_lines,
    cost_lines,
    describe_items,
    format_duration,
    format_usd_amount,
    input_lines,
)
from .options import ASK_AGAIN, OutputMode
from .report_at_end import write_report_at_end
from .run_end import print_result
from .stages import pipeline_session, print_pipeline_result


def pilot_lines(found: PilotResult) -> Iterator[str]:
    """Yield what a pilot measured, and the estimate for the whole run."""
    kind = "SIMULATED: " if found.simulated else ""
    stats = found.stats
    yield (
        f"{kind}pilot: {found.items:,} of {count_nouns(found.total, 'item')}, spread over the "
        "input: "
        f"{found.done:,} done, {found.failed:,} failed"
    )
    if stats is None or found.forecast is None:
        yield "  no model was called for these items"
        return
    for name, count in sorted(stats.failed.items(), key=lambda pair: -pair[1]):
        yield f"  {count:,} x {name}"
    if stats.unreported:
        yield f"  the endpoint reported no tokens for {count_nouns(stats.unreported, 'item')}"
    usage = stats.usage
    requests = round(stats.requests.likely * stats.items)
    yield (
        f"  {count_nouns(requests, 'request')}, {usage.prompt or 0:,} prompt + "
        f"{usage.completion or 0:,} "
        "completion tokens"
    )
    if lost := round(stats.lost.likely * stats.items):
        yield f"  up to {lost:,} tokens more may be charged for requests without an answer"
    yield from _pilot_cost_lines(found)
    median, late = map(format_duration, stats.latencies)
    yield f"  latency: median {median}, 95 % within {late}"
    yield f"estimate for all {count_nouns(found.total, 'item')}:"
    for line in (
        *cost_lines(found.forecast, found.plan),
        *budget_lines(found.forecast, found.plan),
    ):
        yield f"  {line}"


def _pilot_cost_lines(found: PilotResult) -> Iterator[str]:
    """Yield the cost of the pilot's answers if the token price is known."""
    price, stats = found.plan.price, found.stats
    if price is not None and price.prompt is not None and stats is not None:
        yield f"  cost: {format_usd_amount(stats.nano_usd / NANO_PER_USD)}, at {price}"


def confirm_rest(left: int) -> bool:
    """Ask whether to continue with the other items; no answer means no."""
    try:  # Ctrl-C may come before the question is printed
        sys.stderr.write(f"Continue with the other {count_nouns(left, 'item')}? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().casefold() in {"y", "yes"}
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return False


T = TypeVar("T")


def run_or_resume(config: str, out: Path | None, overrides: Overrides, output: OutputMode) -> int:
    """Start a run, or resume the one in ``out``; return the exit code.

    Raises:
        ConfigurationError: The options or the settings are wrong.
    """
    _check_extension_options(overrides)
    loaded, notices = overrides.resolve(config)
    print_messages(notices)
    return run_in_folder(out or default_run_folder(loaded.config.name), loaded, overrides, output)


def _check_extension_options(overrides: Overrides) -> None:
    given = overrides.ask_again
    if given is not None and given not in ASK_AGAIN:
        raise ConfigurationError(f"--ask-again {given}: choose one of {', '.join(ASK_AGAIN)}")
    for option, value in (("--ask-again", given), ("--only", overrides.only)):
        if value is not None and overrides.extends is None:
            raise ConfigurationError(f"{option} needs --from DIR, the run whose items are meant")


def run_in_folder(
    path: Path, loaded: LoadedConfig, overrides: Overrides, output: OutputMode
) -> int:
    """Start a run in a folder, or resume the one in it; return the exit code."""
    if loaded.config.stages is not None:
        session = pipeline_session(path, loaded, overrides, output)
        code = print_pipeline_result(_run_guarded(session, path), output)
        write_report_at_end(path, code, output)
        return code
    pilot = None
    if overrides.pilot is not None:
        pilot = _run_guarded(_pilot_session(path, loaded, overrides, output), path)
        if not output.as_json:
            print_messages(pilot_lines(pilot))
        if pilot.left and not overrides.yes:
            asked = is_interactive() and not output.as_json
            if not asked or not confirm_rest(pilot.left):
                return _stop_after_pilot(pilot, path, asked, output)
    result = _run_guarded(_whole_session(path, loaded, overrides, output), path)
    code = print_result(result, output, None if pilot is None else pilot.to_json())
    write_report_at_end(path, code, output)
    return code


async def _pilot_session(
    path: Path, loaded: LoadedConfig, overrides: Overrides, output: OutputMode
) -> PilotResult:
    run, options = await _prepare_session(path, loaded, overrides, output)
    options = replace(options, retry_failed=False)  # the session after it retries them
    return await run_pilot(run, options, overrides.pilot or 1, open_message_console())


def _stop_after_pilot(found: PilotResult, path: Path, asked: bool, output: OutputMode) -> int:
    """Report that the run stops after its pilot and how to resume; return the exit code."""
    why = "declined" if asked else "no terminal to ask on; use --yes to continue without asking"
    if output.as_json:
        about = open_folder(path).read_provenance()
        print_json(
            {
                "run": about["run"],
                "folder": str(path),
                "simulated": found.simulated,
                "pilot": found.to_json(),
                "exit_code": EXIT_INTERRUPTED,
            }
        )
    else:
        print_messages([f"Stopped after the pilot: {why}", f"Resume with: fanfold resume {path}"])
    return EXIT_INTERRUPTED


def _run_guarded(session: Coroutine[Any, Any, T], path: Path) -> T:
    """Run one session; treat SIGTERM and warning signals as SIGINT, also at its start and end.

    Raises:
        RunStoppedError: It was stopped and can be resumed.
        FanfoldError: It was stopped before there was anything to resume.
    """
    numbers = (signal.SIGTERM, *WARNING_SIGNALS)
    before = {n: signal.signal(n, lambda *_: signal.raise_signal(signal.SIGINT)) for n in numbers}
    try:
        return asyncio.run(session)
    except KeyboardInterrupt:
        if not path.is_dir() or is_vacant(path):
            raise FanfoldError("interrupted before anything was written") from None
        msg = f"interrupted during startup; resume with: fanfold resume {path}"
        raise RunStoppedError(msg) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_in_session(
    folder: RunFolder, loaded: LoadedConfig | None, overrides: Overrides, output: OutputMode
) -> int:
    """Resume a run by a session; return the exit code."""
    path = folder.path
    if folder.is_pipeline:
        session = pipeline_session(path, loaded, overrides, output)
        code = print_pipeline_result(_run_guarded(session, path), output)
        write_report_at_end(path, code, output)
        return code
    result = _run_guarded(_whole_session(path, loaded, overrides, output), path)
    code = print_result(result, output)
    write_report_at_end(path, code, output)
    return code


async def _whole_session(
    path: Path, loaded: LoadedConfig | None, overrides: Overrides, output: OutputMode
) -> RunResult:
    run, options = await _prepare_session(path, loaded, overrides, output)
    return await execute_run(run, options, open_message_console())


async def _prepare_session(
    path: Path, loaded: LoadedConfig | None, overrides: Overrides, output: OutputMode
) -> tuple[ReadyRun, RunOptions]:
    """Create the run in an empty folder, or check that the settings fit the one that is there.

    Args:
        path: The run folder.
        loaded: The settings; None takes those of the run.
        overrides: Options of the command.
        output: How the command prints.
    """
    began = time.time()
    end = None if loaded is None else session_deadline(loaded.config, began)
    await check_saver(overrides.checkpointer)
    if loaded is not None and is_vacant(path):
        extension = await _open_extension(loaded, overrides, output)
        extend = only = None
        if extension is not None:
            extend, only = extension.take_over, extension.selected
        run = await with_deadline(prepare_run(loaded, path, extend=extend, only=only), end)
        if not output.quiet:
            print_messages(_about(run.folder))
    else:
        folder = open_folder(path)
        if overrides.extends is not None:
            await asyncio.to_thread(_check_extended, folder, overrides)
        run = await with_deadline(resume_run(folder, loaded), end)
        if overrides.budget_assignments:  # the latest setting counts
            await asyncio.to_thread(run.folder.raised_limits.unlink, missing_ok=True)
        if overrides.retry_failed:
            notice = await asyncio.to_thread(truncated_notice, run.folder)
            print_messages([] if notice is None else [notice])
    options = RunOptions(
        overrides.checkpointer,
        overrides.trace,
        overrides.retry_failed,
        quiet=output.is_silent,
        deadline=end or session_deadline(run.loaded.config, began),
    )
    return run, options


async def _open_extension(
    loaded: LoadedConfig, overrides: Overrides, output: OutputMode
) -> Extension | None:
    """Return the run that a new run extends, or None.

    Raises:
        ConfigurationError: It cannot be extended.
    """
    if overrides.extends is None:
        return None
    asks = is_interactive() and not output.as_json
    confirm = make_confirmation(overrides.yes, asks)
    return await asyncio.to_thread(
        Extension.open, overrides.extends, loaded, overrides.ask_again, confirm, overrides.only
    )


def _check_extended(folder: RunFolder, overrides: Overrides) -> None:
    """Check that an existing run extends the run that is named; then it is resumed.

    The other folder may be gone by now.

    Raises:
        ConfigurationError: It does not, or by other items.
    """
    source, only = overrides.extends, overrides.only
    assert source is not None, "the command names a run"
    known = folder.read_provenance().get("from")
    check_ask_again(folder, known, overrides.ask_again)
    if known is not None and known["only"] != only:
        chosen = "all items" if known["only"] is None else f"--only {known['only']!r}"
        msg = f"{folder.path}: this run exists and was begun with {chosen}; choose another --out"
        raise ConfigurationError(msg)
    if known is not None and not source.exists():
        return
    if known is None or known["run"] not in get_run_ids(open_folder(source).read_provenance()):
        msg = (
            f"{folder.path}: this run exists and does not extend {source}; --from begins a new "
            "run: choose another --out"
        )
        raise ConfigurationError(msg)


def _about(folder: RunFolder) -> list[str]:
    """Return what was read, what was skipped, and the run folder."""
    found = folder.read_provenance()["input"]
    items = describe_items(found["items"], found.get("samples", 1))
    first = f"{items} from {found['source']}; run folder {folder.path}"
    return [first, *input_lines(found)]
