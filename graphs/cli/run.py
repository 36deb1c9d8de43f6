"""Run, resume, --pilot."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ...backends.budget.cost import in_words
from ...backends.core.errors import BUDGET, INTERRUPTED, FanfoldError, RunStoppedError
from ...backends.core.money import NANO
from ...backends.storage.run_folder import RunFolder, is_vacant, open_folder
from ...configs.loader import Loaded
from ...configs.resolve import Wish
from ..jobs.usage import campaign_inside
from ..run.checkpoints import check_saver
from ..run.console import Terminal, messages, print_json, say
from ..run.prepare import default_folder, prepare_run, resume_run
from ..run.shutdown import WARNINGS, life_end, within
from ..session import Piloted, RunOptions, RunResult, execute, fly
from . import status
from .format import budget_lines, cost_lines, dollars, duration, show_aggregate


def pilot_lines(found: Piloted) -> Iterator[str]:
    """Yield what a pilot measured, and what the run will take going by it."""
    kind = "SIMULATED: " if found.simulated else ""
    seen = found.seen
    yield (
        f"{kind}pilot: {found.items:,} of {found.total:,} items, spread over the input: "
        f"{found.done:,} done, {found.failed:,} failed"
    )
    if seen is None or found.forecast is None:
        yield "  no model was asked for any of them"
        return
    for name, count in sorted(seen.failed.items(), key=lambda pair: -pair[1]):
        yield f"  {count:,} x {name}"
    if seen.unreported:
        yield f"  tokens of {seen.unreported:,} items were not reported"
    usage = seen.usage
    requests = round(seen.requests.likely * seen.items)
    yield (
        f"  {requests:,} requests, {usage.prompt or 0:,} prompt + {usage.completion or 0:,} "
        "completion tokens"
    )
    if lost := round(seen.lost.likely * seen.items):
        yield f"  {lost:,} tokens of requests without an answer may have been paid as well"
    yield from _paid(found)
    median, late = map(duration, seen.latencies)
    yield f"  latency: median {median}, 95 % within {late}"
    yield f"all {found.total:,} items, going by these:"
    for line in (
        *cost_lines(found.forecast, found.plan),
        *budget_lines(found.forecast, found.plan),
    ):
        yield f"  {line}"


def _paid(found: Piloted) -> Iterator[str]:
    """Yield what the answers of the pilot have cost, if there is a price of tokens."""
    price, seen = found.plan.price, found.seen
    if price is not None and price.prompt is not None and seen is not None:
        yield f"  cost: {dollars(seen.nano_usd / NANO)}, at {price}"


def asks() -> bool:
    """Say whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agreed(left: int) -> bool:
    """Ask whether to go on with the other items; no answer is no."""
    try:  # Ctrl-C may come before the question is out
        sys.stderr.write(f"Go on with the other {left:,} items? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().casefold() in {"y", "yes"}
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return False


T = TypeVar("T")

_NAMED: Final = 10
"""So many skipped items are named in one line."""


@dataclass(frozen=True, slots=True)
class Output:
    """How a run reports: as one JSON object, or quietly, or with progress and tables."""

    as_json: bool
    quiet: bool

    @property
    def silent(self) -> bool:
        """Say whether progress and tables are left out."""
        return self.as_json or self.quiet


def run(config: str, out: Path | None, wish: Wish, output: Output) -> int:
    """Start a run, or go on with the one in ``out``; return the exit code."""
    loaded, notices = wish.settled(config)
    say(notices)
    if wish.pilot is not None:
        return _piloted(loaded, out, wish, output)
    if out is not None and not is_vacant(out):
        result = _lived(_resume(open_folder(out), loaded, wish, output), out)
    else:
        path = out or default_folder(loaded.config.name)
        result = _lived(_start(loaded, path, wish, output), path)
    return _finish(result, output)


def _piloted(loaded: Loaded, out: Path | None, wish: Wish, output: Output) -> int:
    """Run some items, show what they took, and go on with the others if that is agreed to."""
    path = out or default_folder(loaded.config.name)
    fresh = out is None or is_vacant(out)
    found = _lived(_pilot(loaded, path, fresh, wish, output), path)
    if not output.as_json:
        say(pilot_lines(found))
    if found.left and not wish.yes:
        asked = asks() and not output.as_json
        if not asked or not agreed(found.left):
            return _ended(found, path, asked, output)
    result = _lived(_resume(open_folder(path), loaded, wish, output), path)
    return _finish(result, output, found)


async def _pilot(loaded: Loaded, path: Path, fresh: bool, wish: Wish, output: Output) -> Piloted:
    end = life_end(loaded.config, time.time())
    await check_saver(wish.checkpointer)
    if fresh:
        folder = await within(prepare_run(loaded, path), end)
        if not output.quiet:
            say(_about(folder))
    else:
        resumed = await within(resume_run(open_folder(path), loaded), end)
        folder, loaded = resumed.folder, resumed.loaded
    options = RunOptions(wish.checkpointer, wish.trace, quiet=output.silent, end=end)
    return await fly(folder, loaded, options, wish.pilot or 1, messages())


def _ended(found: Piloted, path: Path, asked: bool, output: Output) -> int:
    """Say that the run stops after its pilot, and how to go on; return the exit code."""
    why = "no" if asked else "nobody there to be asked; --yes goes on without asking"
    if output.as_json:
        about = open_folder(path).read_provenance()
        print_json(
            {
                "run": about["run"],
                "folder": str(path),
                "simulated": found.simulated,
                "pilot": found.to_json(),
                "exit_code": INTERRUPTED,
            }
        )
    else:
        say([f"Stopped after the pilot: {why}", f"Go on with: fanfold resume {path}"])
    return INTERRUPTED


def _lived(life: Coroutine[Any, Any, T], path: Path) -> T:
    """Run one life; other signals stop it like SIGINT also while it begins, SIGTERM at its end too.

    Raises:
        RunStoppedError: It was stopped, and can be resumed.
        FanfoldError: It was stopped before there was anything to resume.
    """
    numbers = (signal.SIGTERM, *WARNINGS)
    before = {n: signal.signal(n, lambda *_: signal.raise_signal(signal.SIGINT)) for n in numbers}
    try:
        return asyncio.run(life)
    except KeyboardInterrupt:
        if not path.is_dir():
            raise FanfoldError("interrupted before anything was written") from None
        msg = f"interrupted while it began; go on with: fanfold resume {path}"
        raise RunStoppedError(msg) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume(path: Path, wish: Wish, output: Output) -> int:
    """Go on with a run; return the exit code."""
    folder = open_folder(path)
    loaded = wish.settled(str(folder.settings))[0] if wish.changes_settings else None
    return _finish(_lived(_resume(folder, loaded, wish, output), path), output)


async def _start(loaded: Loaded, path: Path, wish: Wish, output: Output) -> RunResult:
    end = life_end(loaded.config, time.time())
    await check_saver(wish.checkpointer)
    folder = await within(prepare_run(loaded, path), end)
    if not output.quiet:
        say(_about(folder))
    options = RunOptions(wish.checkpointer, wish.trace, quiet=output.silent, end=end)
    return await execute(folder, loaded, options, messages())


async def _resume(
    folder: RunFolder, loaded: Loaded | None, wish: Wish, output: Output
) -> RunResult:
    began = time.time()
    end = None if loaded is None else life_end(loaded.config, began)
    await check_saver(wish.checkpointer)
    resumed = await within(resume_run(folder, loaded), end)
    if wish.caps:  # the latest word counts
        await asyncio.to_thread(folder.caps.unlink, missing_ok=True)
    options = RunOptions(
        wish.checkpointer,
        wish.trace,
        wish.retry_failed,
        anew=resumed.reduce_changed,
        quiet=output.silent,
        end=end or life_end(resumed.loaded.config, began),
    )
    return await execute(folder, resumed.loaded, options, messages())


def _about(folder: RunFolder) -> list[str]:
    """Say what was read, what was left out, and where the run lies."""
    found = folder.read_provenance()["input"]
    lines = [f"{found['items']:,} items from {found['source']}; run folder {folder.path}"]
    if skipped := found["skipped"]:
        names = ", ".join(s["id"] for s in skipped[:_NAMED])
        more = ", …" if len(skipped) > _NAMED else ""
        lines.append(f"skipped {found['skipped_total']:,}: {names}{more}")
        lines.append(f"  {skipped[0]['id']}: {skipped[0]['reason']}; all reasons: provenance.json")
    if found["invalid"]:
        lines.append(f"{found['invalid']:,} items cannot be asked and will fail without a call")
    return lines


def _finish(result: RunResult, output: Output, pilot: Piloted | None = None) -> int:
    """Print how a life of a run ended; return the exit code.

    One that was cut short by its job's end tells of its jobs no more than their node-hours.
    """
    path, whole = result.folder.path, result.code != INTERRUPTED
    if output.as_json:
        first = {} if pilot is None else {"pilot": pilot.to_json()}
        jobs = campaign_inside(path, shares=whole)
        print_json(
            {
                "run": result.run,
                "folder": str(path),
                **result.progress,
                **first,
                **({} if result.cost is None else result.cost.to_json()),
                "budget": result.budget,
                "seconds": result.seconds,
                "aggregate": result.aggregate,
                **({} if jobs is None else {"chain": jobs}),
                "exit_code": result.code,
            }
        )
        return result.code
    if not output.quiet:
        show_aggregate(result.aggregate, result.simulated, Terminal())
    say(_last_lines(result))
    if (jobs := campaign_inside(path, shares=whole)) is not None:
        say(list(status.in_words(jobs)))
    return result.code


def _last_lines(result: RunResult) -> list[str]:
    progress, folder = result.progress, result.folder
    kind = "SIMULATED: " if result.simulated else ""
    reused = f"{progress['reused']:,} answers reused, " * (progress["reused"] > 0)
    wasted = progress["tokens"]["wasted"]
    lines = [
        f"{kind}{progress['done']:,} done, {progress['failed']:,} failed of "
        f"{progress['items']:,} in {result.seconds:,.1f} s; {progress['requests']:,} requests, "
        f"{reused}{progress['tokens']['prompt']:,} + {progress['tokens']['completion']:,} tokens"
        + (f", {wasted:,} wasted" if wasted else "")
    ]
    if result.cost is not None:
        lines += in_words(result.cost, timed="node_hours" in result.budget)
    if result.code == BUDGET:
        lines.append(f"Paused: {result.reason}")
        lines.append(f"Go on with a higher total: fanfold resume {folder.path} {_raise(result)}")
        return lines
    if result.code == INTERRUPTED:
        lines.append(f"Interrupted: {result.reason}")
        lines.append(f"Go on with: fanfold resume {folder.path}")
        return lines
    lines.append(f"Results: {folder.results}")
    if progress["failed"]:
        lines.append(f"Failed items, with class and text: {folder.failures}")
    return lines


def _raise(result: RunResult) -> str:
    """Return the options that raise what limits the run."""
    return " ".join(f"--budget-{name.replace('_', '-')} N" for name in result.budget)
