"""What the commands do."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table

from ..backends.accounts.folder import RunFolder, is_vacant, open_folder
from ..backends.accounts.ledger import Ledger
from ..backends.accounts.results import write_csv, write_jsonl, write_parquet
from ..backends.contract.errors import ConfigurationError, FanfoldError, RunStoppedError
from ..backends.fleet.simulated.fleet import SimulatedFleet
from ..backends.fleet.simulated.spec import SimulationSpec
from ..configs.load import Loaded, load
from ..configs.presets import copy_preset, preset_names, preset_text
from .estimate import Estimate, estimate
from .prepare import default_folder, prepare_run
from .report import show_aggregate
from .resume import resume_run
from .run import INTERRUPTED, OTHER, USAGE, RunOptions, RunResult, execute
from .settings import settle

_FORMATS: Final = ("jsonl", "csv", "parquet")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options ask for; each is as in the command line."""

    overrides: list[str]
    input_path: str | None = None
    limit: int | None = None
    endpoints: str | None = None
    checkpointer: str | None = None
    trace: bool = False
    retry_failed: bool = False

    def settled(self, config: str) -> tuple[Loaded, list[str]]:
        """Return the configuration with the options applied, and notices."""
        return settle(config, self.overrides, self.input_path, self.limit, self.endpoints)


@dataclass(frozen=True, slots=True)
class Output:
    """How a run reports: as one JSON object, or quietly, or with progress and tables."""

    as_json: bool
    quiet: bool


def exit_code(error: FanfoldError) -> int:
    """Return the exit code of an error."""
    if isinstance(error, ConfigurationError):
        return USAGE
    return INTERRUPTED if isinstance(error, RunStoppedError) else OTHER


def run(config: str, out: Path | None, wish: Wish, output: Output) -> int:
    """Start a run, or go on with the one in ``out``; return the exit code."""
    loaded, notices = wish.settled(config)
    console = _console()
    for notice in notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    path = out or default_folder(loaded.config.name)
    if out is not None and not is_vacant(out):
        return _finish(asyncio.run(_resume(open_folder(out), loaded, wish, output)), output)
    return _finish(asyncio.run(_start(loaded, path, wish, output)), output)


def resume(folder: Path, wish: Wish, output: Output) -> int:
    """Go on with a run; return the exit code."""
    opened = open_folder(folder)
    changed = wish.input_path or wish.limit or wish.endpoints or wish.overrides
    loaded = wish.settled(str(opened.settings))[0] if changed else None
    return _finish(asyncio.run(_resume(opened, loaded, wish, output)), output)


async def _start(loaded: Loaded, path: Path, wish: Wish, output: Output) -> RunResult:
    folder = await prepare_run(loaded, path)
    _announce(folder, output)
    options = RunOptions(wish.checkpointer, wish.trace, quiet=output.quiet or output.as_json)
    return await execute(folder, loaded, options, _console())


async def _resume(
    folder: RunFolder, loaded: Loaded | None, wish: Wish, output: Output
) -> RunResult:
    resumed = await resume_run(folder, loaded)
    options = RunOptions(
        wish.checkpointer,
        wish.trace,
        wish.retry_failed,
        anew=resumed.reduce_changed,
        quiet=output.quiet or output.as_json,
    )
    return await execute(folder, resumed.loaded, options, _console())


def _announce(folder: RunFolder, output: Output) -> None:
    about = folder.read_provenance()
    found = about["input"]
    if output.quiet:
        return
    lines = [f"{found['items']:,} items from {found['source']}; run folder {folder.path}"]
    if skipped := found["skipped"]:
        names = ", ".join(s["id"] for s in skipped[:10])
        more = ", …" if len(skipped) > 10 else ""  # noqa: PLR2004 - so many names fit a line
        lines.append(f"skipped {len(skipped)}: {names}{more} ({skipped[0]['reason']})")
    if found["invalid"]:
        lines.append(f"{found['invalid']:,} items cannot be asked and will fail without a call")
    for line in lines:
        _console().print(line, markup=False, highlight=False, soft_wrap=True)


def _finish(result: RunResult, output: Output) -> int:
    """Print how a life of a run ended; return the exit code."""
    if output.as_json:
        _print_json(
            {
                "run": result.run,
                "folder": str(result.folder.path),
                **result.progress,
                "seconds": result.seconds,
                "aggregate": result.aggregate,
                "exit_code": result.code,
            }
        )
        return result.code
    if not output.quiet:
        show_aggregate(result.aggregate, result.simulated, Console())
    for line in _last_lines(result):
        _console().print(line, markup=False, highlight=False, soft_wrap=True)
    return result.code


def _last_lines(result: RunResult) -> list[str]:
    progress, folder = result.progress, result.folder
    kind = "SIMULATED: " if result.simulated else ""
    lines = [
        f"{kind}{progress['done']:,} done, {progress['failed']:,} failed of "
        f"{progress['items']:,} in {result.seconds:,.1f} s; {progress['requests']:,} requests, "
        f"{progress['tokens']['prompt']:,} + {progress['tokens']['completion']:,} tokens"
    ]
    if result.code == INTERRUPTED:
        lines.append(f"Interrupted ({result.reason}). Go on with: fanfold resume {folder.path}")
        return lines
    lines.append(f"Results: {folder.results}")
    if progress["failed"]:
        lines.append(f"Failed items, with class and text: {folder.failures}")
    return lines


def status(path: Path, as_json: bool) -> None:
    """Show how far a run is."""
    folder = open_folder(path)
    about = folder.read_provenance()
    with Ledger(folder.journal, about["run"], about["input"]["items"]) as ledger:
        counts, spent = ledger.counts(), ledger.spent
    last = about["lives"][-1] if about["lives"] else {"outcome": None}
    state = "running" if folder.in_use() else last["outcome"] or "killed; resumable"
    facts = {
        "run": about["run"],
        "name": about["name"],
        "state": state,
        "simulated": about["simulated"],
        "model": about["model"],
        "items": about["input"]["items"],
        "done": counts.done,
        "failed": counts.failed,
        "open": counts.open,
        "requests": spent.requests,
        "tokens": {"prompt": spent.prompt_tokens, "completion": spent.completion_tokens},
        "lives": len(about["lives"]),
    }
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        shown = "true" if value is True else "false" if value is False else str(value)
        table.add_row(key, shown)
    Console().print(table)


def results(path: Path, form: str, target: Path | None) -> None:
    """Write the finished items' rows."""
    if form not in _FORMATS:
        raise ConfigurationError(f"--format {form}: there are {', '.join(_FORMATS)}")
    if form == "parquet" and target is None:
        raise ConfigurationError("--format parquet is no text; give a file with -o FILE")
    folder = open_folder(path)
    about, schema = folder.read_provenance(), load(folder.settings).config.task.answer_schema
    with Ledger(folder.journal, about["run"], about["input"]["items"]) as ledger:
        records = ledger.records()
        if form == "parquet" and target is not None:
            write_parquet(records, target, schema)
        elif target is None:
            _write_text(records, form, sys.stdout.buffer, schema)
        else:
            with _opened(target) as stream:
                _write_text(records, form, stream, schema)


def _opened(target: Path) -> Any:
    try:
        return target.open("wb")
    except OSError as error:
        raise ConfigurationError(f"{target}: cannot be written: {error.strerror}") from None


def _write_text(records: Any, form: str, stream: Any, schema: dict[str, Any] | None) -> None:
    if form == "csv":
        write_csv(records, stream, schema)
    else:
        write_jsonl(records, stream)


def check(config: str, wish: Wish) -> None:
    """Check settings, input and endpoints; print what a run would ask and take."""
    loaded, notices = wish.settled(config)
    found = asyncio.run(estimate(loaded))
    console = Console()
    for notice in notices:
        console.print(notice, markup=False, highlight=False, soft_wrap=True)
    for line in _estimate_lines(loaded, found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _estimate_lines(loaded: Loaded, found: Estimate) -> list[str]:
    lines = [
        f"settings: {loaded.source}: valid",
        f"input: {found.items:,} items from {found.source}"
        + (f", {found.skipped:,} skipped" if found.skipped else "")
        + (f", {found.invalid:,} cannot be asked" if found.invalid else ""),
        *(f"endpoint: {line}" for line in found.endpoints),
        f"first prompt (item {found.first_id}):",
        *(f"  {line}" for line in found.first_prompt.splitlines()),
        f"requests: {found.requests:,} to {found.most_requests:,} (with every repair)",
        f"tokens: about {found.prompt_tokens:,} prompt (4 bytes a token), "
        f"at most {found.completion_tokens:,} completion",
    ]
    return lines


def simulate(fields: dict[str, Any], file: Path) -> None:
    """Serve a simulated fleet until interrupted."""
    spec = SimulationSpec.from_json(orjson.dumps(fields))
    try:
        asyncio.run(_serve(spec, file))
    except KeyboardInterrupt:
        return


async def _serve(spec: SimulationSpec, file: Path) -> None:
    async with SimulatedFleet(spec) as fleet:
        text = "".join(f"{url}\n" for url in fleet.urls)
        await asyncio.to_thread(file.write_text, text)
        console = _console()
        console.print(f"SIMULATED fleet of {spec.nodes} nodes serving {spec.model!r}")
        console.print(f"endpoints: {file}  (fanfold run CONFIG --endpoints {file})")
        console.print(f"control: {fleet.base_url}   Ctrl-C ends it")
        await asyncio.Event().wait()


def presets_list() -> None:
    """List the presets with the first line of each."""
    for name in preset_names():
        print(f"{name:24} {preset_text(name).splitlines()[0].removeprefix('# ')}")


def presets_show(name: str) -> None:
    """Print a preset."""
    print(preset_text(name), end="")


def presets_copy(name: str, target: Path) -> None:
    """Write a preset to a file."""
    copy_preset(name, target)
    print(f"{target} written; fill in endpoints and input, then: fanfold check {target}")


def _console() -> Console:
    """Return the console for everything that is not the command's result."""
    return Console(stderr=True, highlight=False)


def _print_json(data: Any) -> None:
    sys.stdout.write(orjson.dumps(data).decode() + "\n")
