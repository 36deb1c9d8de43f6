"""``fanfold submit``: create a run folder and its job script, and submit the first job."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...backends.cluster.chain import MAX_IDLE_JOBS, ChainFile, chain_file
from ...backends.cluster.job_plan import JobPlan
from ...backends.cluster.schedulers import SCHEDULERS, Scheduler, check_scheduler
from ...backends.cluster.scripts import (
    job_script,
    launch_script,
    node_script,
    worker_script,
)
from ...backends.core.errors import BackendError, ConfigurationError
from ...backends.core.permissions import find_path_risk
from ...backends.core.terminal import count_nouns
from ...backends.discovery.resolve import has_own_servers
from ...backends.storage.run_folder import RunFolder, is_vacant, open_folder, write_bytes
from ...configs.endpoints import ENDPOINT_KINDS, HOSTS_ONLY_KEYS
from ...configs.loader import LoadedConfig, load_config
from ...configs.overrides import Overrides
from ...configs.raw_settings import get_at_path
from ...configs.site import SiteConfig, load_site
from ..remote.coordinator import STOP_GRACE_S
from ..run.console import print_messages
from ..run.prepare import default_run_folder, prepare_run, resume_run

_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_UNITS: Final = (86400, 3600, 60, 1)
_CLOCK: Final = re.compile(r"(\d+):([0-5]\d):([0-5]\d)")
_BATCH: Final = 64
"""Items per server that keep it busy; with fewer, ``submit`` prints a note."""
_VARIABLE: Final = re.compile(r"(?<!\$)\$\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Options of ``fanfold submit``.

    Attributes:
        site: Name or file of a site.
        nodes: Nodes per job.
        walltime: Time limit per job, as ``2h`` or ``02:00:00``.
        queue: Queue, partition or quality of service.
        account: Account or project.
        jobs: Maximum jobs in the chain, or None.
        node_hours: Maximum node-hours of the chain, or None.
        archive: Environment archive made by ``fanfold pack``, or None.
    """

    site: str
    nodes: int
    walltime: str
    queue: str | None = None
    account: str | None = None
    jobs: int | None = None
    node_hours: float | None = None
    archive: Path | None = None


def parse_walltime(text: str) -> int:
    """Return the seconds of ``2h``, ``1h30m``, ``90m`` or ``02:00:00``.

    Raises:
        ConfigurationError: The text has none of these formats.
    """
    if clock := _CLOCK.fullmatch(text):
        hours, minutes, rest = map(int, clock.groups())
        return 3600 * hours + 60 * minutes + rest
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        msg = f"--walltime {text!r}: write it as 2h, 1h30m, 90m or 02:00:00"
        raise ConfigurationError(msg)
    return sum(int(n or 0) * unit for n, unit in zip(found.groups(), _UNITS, strict=True))


def submit_job(
    config: str, out: Path | None, overrides: Overrides, options: SubmitOptions, dry: bool
) -> None:
    """Prepare a run folder and submit its first job, or only print the script.

    Args:
        config: A preset, a YAML file, or an existing run folder to resume.
        out: The run folder; if it has a run already, the settings must fit it.
        overrides: Settings changed by options.
        options: Options of the jobs.
        dry: Print the script; write and submit nothing.
    """
    folder = _find_run_folder(config, out)
    path = (folder.path if folder else out or default_run_folder(Path(config).stem)).resolve()
    site = load_site(options.site)
    source = str(folder.settings) if folder and Path(config).is_dir() else config
    loaded, notices = _resolve_settings(source, path, overrides, options, site)
    plan = _make_job_plan(loaded, path, options, site)
    plan.check()
    _check_bounds(plan, options, loaded)
    if dry:
        _show(plan)
        return
    check_scheduler(site.scheduler)
    print_messages(notices)
    if folder is not None:
        _check_no_job(chain_file(path), SCHEDULERS[site.scheduler])
    _prepare(folder, loaded, path)
    _write(plan)
    job = _submit_first(plan, options)
    print_messages(_about(plan, job, loaded, options))


def _prepare(folder: RunFolder | None, loaded: LoadedConfig, path: Path) -> None:
    """Create the folder of a run or a pipeline, or check that the settings fit the existing one."""
    deferred = loaded.config.node.serve is not None
    if loaded.config.stages is None:
        if folder is not None and folder.is_pipeline:
            raise ConfigurationError(f"{path}: this is a pipeline; its settings need stages")
        if folder is None:
            asyncio.run(prepare_run(loaded, path, defer_endpoints=deferred))
        else:
            asyncio.run(resume_run(folder, loaded))
        return
    from ..run.pipeline import (  # noqa: PLC0415 - imports pyarrow and the operators
        prepare_pipeline,
        write_settings,
    )

    if folder is None:
        asyncio.run(prepare_pipeline(loaded, path, defer_endpoints=deferred))
    elif folder.is_pipeline:
        write_settings(folder, loaded)
    else:
        msg = f"{path}: this is a single run, but the settings have stages; use a new folder"
        raise ConfigurationError(msg)


def _find_run_folder(config: str, out: Path | None) -> RunFolder | None:
    """Return the run folder to resume, or None for a new run."""
    if Path(config).is_dir():
        if out is not None:
            raise ConfigurationError(f"{config} is a run folder; --out is for new runs")
        return open_folder(Path(config))
    return open_folder(out) if out is not None and not is_vacant(out) else None


def _resolve_settings(
    config: str, path: Path, overrides: Overrides, options: SubmitOptions, site: SiteConfig
) -> tuple[LoadedConfig, list[str]]:
    """Return the settings, adapted to the nodes of the jobs."""
    loaded, notices = overrides.resolve(config)
    settings: dict[str, Any] = {}
    backend = loaded.config.backend
    if backend.starts_workers_on_nodes and backend.command is None:
        settings["backend.workers"] = options.nodes
    if loaded.config.node.serve is not None:
        settings |= _server_settings(loaded, path, options, site)
    if not settings:
        return loaded, notices
    # load the settings again as written, with those of the job
    again = load_config(loaded.raw, (), settings)
    again = replace(again, source=loaded.source, preset=loaded.preset)
    if again.config.stages is not None:
        _check_models(again)
    return again, notices


def _check_models(loaded: LoadedConfig) -> None:
    """Check that the servers of a job can serve all models of a pipeline.

    Raises:
        ConfigurationError: They cannot, or a model has no name.
    """
    from ..run.pipeline import list_served  # noqa: PLC0415 - imports pyarrow and the operators

    served = list_served(loaded)
    if len(served) > 1 and not loaded.config.backend.node_endpoints:
        msg = (
            f"{loaded.source}: the stages use the models {', '.join(served)} of node.serve, and "
            "'fanfold serve' serves one of them in a job; let the workers of each stage start its "
            "servers: backend: {kind: launched, node_endpoints: true}"
        )
        raise ConfigurationError(msg)


def _server_settings(
    loaded: LoadedConfig, path: Path, options: SubmitOptions, site: SiteConfig
) -> dict[str, Any]:
    """Return the settings that make the job's own servers the endpoints.

    Raises:
        ConfigurationError: The model has no name, or other endpoints are configured.
    """
    if loaded.config.model.name is None and loaded.config.stages is None:
        msg = (
            f"{loaded.source}: model.name is missing; set it, because the servers of the job "
            "cannot be asked before it starts"
        )
        raise ConfigurationError(msg)
    config = loaded.config
    if not has_own_servers(config) and config.endpoints.simulated is None:
        (kind,) = (k for k in ENDPOINT_KINDS if getattr(config.endpoints, k) not in (None, False))
        msg = (
            f"{loaded.source}: node.serve starts servers, but endpoints.{kind} refers to servers "
            "that run already; remove one of them"
        )
        raise ConfigurationError(msg)
    settings: dict[str, Any] = {f"endpoints.{k}": None for k in (*ENDPOINT_KINDS, *HOSTS_ONLY_KEYS)}
    settings["endpoints.file"] = str(path / "cluster" / "servers")
    if not loaded.config.backend.node_endpoints:  # else the coordinator uses no endpoints
        wanted, own = options.nodes * loaded.config.node.instances, loaded.config.endpoints
        least = own.least if own.least > 1 else max(1, wanted // 2)
        settings["endpoints.least"] = min(least, wanted)  # an earlier job may have had more nodes
        settings["endpoints.wait_s"] = own.wait_s or loaded.config.node.timeout_s
    if get_at_path(loaded.raw, ("limits", "fleet_wait_s")) is None:  # a restart may take so long
        settings["limits.fleet_wait_s"] = loaded.config.node.timeout_s
    own_cards = loaded.config.node.accelerators
    if site.accelerators is not None and own_cards.variable == "none":
        settings["node.accelerators.variable"] = site.accelerators.variable
        settings["node.accelerators.count"] = site.accelerators.per_node
    return settings


def _make_job_plan(
    loaded: LoadedConfig, path: Path, options: SubmitOptions, site: SiteConfig
) -> JobPlan:
    archive = options.archive.resolve() if options.archive else None
    if archive is not None and not archive.is_file():
        raise ConfigurationError(
            f"--pack {archive}: no such file; create it with: fanfold pack -o FILE"
        )
    if archive is not None and (reason := find_path_risk(archive)) is not None:
        raise ConfigurationError(f"--pack: other users could change what the jobs run: {reason}")
    backend = loaded.config.backend
    serves = loaded.config.node.serve is not None
    if loaded.config.stages is not None and backend.node_endpoints:
        serves = False  # workers start the servers of each stage, which may have another model
    return JobPlan(
        run=path,
        name=loaded.config.name,
        command=(
            sys.executable,
            "-P",
            "-m",
            "fanfold",
        ),  # Slurm may start in a folder that others can write to
        site=site,
        nodes=options.nodes,
        walltime_s=parse_walltime(options.walltime),
        drain_s=loaded.config.limits.drain_s + (STOP_GRACE_S if backend.is_remote else 0.0),
        starts_servers=serves,
        starts_workers=backend.starts_workers_on_nodes and backend.command is None,
        queue=options.queue,
        account=options.account,
        archive=archive,
    )


def _check_bounds(plan: JobPlan, options: SubmitOptions, loaded: LoadedConfig) -> None:
    """Check that the first job fits the chain's node-hours and has time for items.

    Raises:
        ConfigurationError: It may exceed the node-hours, or has no time left for items.
    """
    kept = plan.reserve_s + plan.drain_s + loaded.config.limits.margin_s
    if kept >= plan.walltime_s:
        msg = (
            f"--walltime {options.walltime}: no time is left for items: {kept:g} s are reserved "
            "for the end (reserve_s of the site, limits.drain_s and margin_s); increase it"
        )
        raise ConfigurationError(msg)
    due = plan.nodes * plan.walltime_s / 3600
    if options.node_hours is not None and due > options.node_hours:
        msg = (
            f"--node-hours {options.node_hours:g}: one job of "
            f"{count_nouns(plan.nodes, 'node')} may take "
            f"{due:.2f}; use fewer nodes, a shorter --walltime or more node-hours"
        )
        raise ConfigurationError(msg)


def _show(plan: JobPlan) -> None:
    shown = [f"# {plan.folder}/{name}\n{text}" for name, text in _scripts(plan).items()]
    print("\n".join(shown), end="")


def _scripts(plan: JobPlan) -> dict[str, str]:
    """Return the job script and the scripts that it calls, by file name."""
    scripts = {"job.sh": job_script(plan)}
    if plan.starts_servers:
        scripts["node.sh"] = node_script(plan)
    if plan.starts_workers:
        scripts |= {"launch.sh": launch_script(plan), "worker.sh": worker_script(plan)}
    return scripts


def _check_no_job(file: ChainFile, scheduler: Scheduler) -> None:
    """Check that no job of the run waits or runs; record those that are gone.

    Raises:
        ConfigurationError: A job waits or runs.
    """
    chain = file.read()
    states = scheduler.fetch_states([job.id for job in chain.unfinished_jobs()])
    if alive := [job for job, state in states.items() if state != "ended"]:
        msg = f"job {alive[0]} of this run is {states[alive[0]]}; wait for it, or: fanfold cancel"
        raise ConfigurationError(msg)
    for job in chain.unfinished_jobs():
        if job.began is None:
            file.append("withdrawn", job=job.id, outcome="gone before it began")


def _write(plan: JobPlan) -> None:
    plan.folder.mkdir(exist_ok=True)
    for name, text in _scripts(plan).items():
        script = plan.folder / name
        write_bytes(script, text.encode())
        mode = script.stat().st_mode
        script.chmod(mode | (mode & 0o444) >> 2)  # executable for everyone who may read it


def _submit_first(plan: JobPlan, options: SubmitOptions) -> str:
    try:
        job = SCHEDULERS[plan.site.scheduler].submit(plan.folder / "job.sh")
    except (BackendError, ConfigurationError) as error:
        msg = f"{error.message}\nThe run folder is ready; try again: fanfold submit {plan.run} …"
        raise type(error)(msg) from None
    terms = {
        "site": plan.site.name,
        "scheduler": plan.site.scheduler,
        "jobs": options.jobs,
        "node_hours": options.node_hours,
    }
    chain_file(plan.run).append(
        "submitted",
        job=job,
        nodes=plan.nodes,
        walltime_s=plan.walltime_s,
        after=None,
        by_hand=True,
        terms=terms,
    )
    return job


def _about(plan: JobPlan, job: str, loaded: LoadedConfig, options: SubmitOptions) -> Iterator[str]:
    found = RunFolder(plan.run).read_provenance()["input"]
    yield f"{count_nouns(found['items'], 'item')} from {found['source']}; run folder {plan.run}"
    nodes = count_nouns(plan.nodes, "node")
    yield f"job {job} submitted: {nodes}, {plan.walltime_s / 3600:g} h at most"
    yield _bounds(options)
    yield f"site {plan.site.name}: {plan.site.tested}; its script: {plan.folder}/job.sh"
    yield from (f"note: {hint}" for hint in plan.site.hints)
    servers, streams = plan.nodes * loaded.config.node.instances, loaded.config.limits.streams
    if plan.starts_servers and streams < servers * _BATCH:
        yield (
            f"note: limits.streams is {streams:,}, so {servers:,} servers have "
            f"{streams / servers:,.0f} items each in flight; their batches may hold more"
        )
    if names := sorted(set(_VARIABLE.findall(str(loaded.plain)))):
        yield (
            f"note: the job needs {', '.join(names)} in its environment; if the scheduler does "
            "not pass it on, set it in 'setup' of a site file"
        )
    yield f"fanfold status {plan.run}   fanfold cancel {plan.run}"


def _bounds(options: SubmitOptions) -> str:
    """Return when the chain ends."""
    given = [f"after {count_nouns(options.jobs, 'job')}"] if options.jobs is not None else []
    if options.node_hours is not None:
        given.append(f"before {options.node_hours:g} node-hours are spent")
    others = ", ".join(given) or "no other limit (--jobs, --node-hours)"
    return (
        f"more jobs follow until all items are finished, or {MAX_IDLE_JOBS} jobs in a row finish "
        f"none; {others}"
    )
