"""The command ``submit_job``: a run folder, its job script, and the first job of a chain."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...backends.cluster.chain import MAX_IDLE_JOBS, ChainFile, chain_file
from ...backends.cluster.schedulers import Scheduler, check_scheduler, make_scheduler
from ...backends.cluster.scripts import (
    JobPlan,
    job_script,
    launch_script,
    node_script,
    worker_script,
)
from ...backends.core.errors import BackendError, ConfigurationError
from ...backends.core.permissions import find_path_risk
from ...backends.discovery.resolve import has_own_servers
from ...backends.storage.run_folder import RunFolder, is_vacant, open_folder, write_bytes
from ...configs.endpoints import ENDPOINT_KINDS, HOSTS_ONLY_KEYS
from ...configs.loader import LoadedConfig, load_config
from ...configs.resolve import Overrides
from ...configs.site import SiteConfig, load_site
from ...configs.source import get_at_path
from ..remote.coordinator import STOP_GRACE_S
from ..run.console import print_messages
from ..run.prepare import default_run_folder, prepare_run, resume_run

_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_UNITS: Final = (86400, 3600, 60, 1)
_CLOCK: Final = re.compile(r"(\d+):([0-5]\d):([0-5]\d)")
_BATCH: Final = 64
"""Items that keep a server busy: below that, a note says that there are few."""
_VARIABLE: Final = re.compile(r"(?<!\$)\$\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What the options of ``submit_job`` ask for.

    Attributes:
        site: A site's name or file.
        nodes: Nodes of each job.
        walltime: Most time of each job, as ``2h`` or ``02:00:00``.
        queue: Queue, partition or quality of service.
        account: Account or project.
        jobs: Most jobs of the chain, or None.
        node_hours: Most node-hours of the chain, or None.
        archive: An environment by ``fanfold pack``, or None.
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
        ConfigurationError: It is none of these.
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
    config: str, out: Path | None, wish: Overrides, order: SubmitOptions, dry: bool
) -> None:
    """Prepare a run folder and submit its first job, or only show the script.

    Args:
        config: A preset, a YAML file, or an existing run folder to go on with.
        out: The run folder; for a new run.
        wish: What the options change of the settings.
        order: What kind of jobs.
        dry: Print the script; write and submit nothing.
    """
    folder = _find_run_folder(config, out)
    path = (folder.path if folder else out or default_run_folder(Path(config).stem)).resolve()
    site = load_site(order.site)
    loaded, notices = _resolve_settings(
        str(folder.settings) if folder else config, path, wish, order, site
    )
    plan = _make_job_plan(loaded, path, order, site)
    plan.check()
    _check_bounds(plan, order, loaded)
    if dry:
        _show(plan)
        return
    check_scheduler(site.scheduler)
    print_messages(notices)
    if folder is not None:
        _check_no_job(chain_file(path), make_scheduler(site.scheduler))
        asyncio.run(resume_run(folder, loaded))
    else:
        asyncio.run(prepare_run(loaded, path, defer_endpoints=plan.starts_servers))
    _write(plan)
    job = _submit_first(plan, order)
    print_messages(_about(plan, job, loaded, order))


def _find_run_folder(config: str, out: Path | None) -> RunFolder | None:
    """Return the run folder to go on with, or None for a new run."""
    if Path(config).is_dir():
        if out is not None:
            raise ConfigurationError(f"{config} is a run folder; --out is for new runs")
        return open_folder(Path(config))
    return open_folder(out) if out is not None and not is_vacant(out) else None


def _resolve_settings(
    config: str, path: Path, wish: Overrides, order: SubmitOptions, site: SiteConfig
) -> tuple[LoadedConfig, list[str]]:
    """Return the settings, with what follows from the job's nodes in them."""
    loaded, notices = wish.resolve(config)
    settings: dict[str, Any] = {}
    backend = loaded.config.backend
    if backend.starts_workers_on_nodes and backend.command is None:
        settings["backend.workers"] = order.nodes
    if loaded.config.node.serve is not None:
        settings |= _server_settings(loaded, path, order, site)
    if not settings:
        return loaded, notices
    # the settings once more, as they were written, with the job's own in them
    again = load_config(loaded.raw, (), settings)
    return replace(again, source=loaded.source, preset=loaded.preset), notices


def _server_settings(
    loaded: LoadedConfig, path: Path, order: SubmitOptions, site: SiteConfig
) -> dict[str, Any]:
    """Return the settings by which the job's own servers are the endpoints.

    Raises:
        ConfigurationError: Nobody says which model they serve, or others serve it already.
    """
    if loaded.config.model.name is None:
        msg = (
            f"{loaded.source}: model.name: nobody can be asked before the job what its servers "
            "serve; set it"
        )
        raise ConfigurationError(msg)
    config = loaded.config
    if not has_own_servers(config) and config.endpoints.simulated is None:
        (kind,) = (k for k in ENDPOINT_KINDS if getattr(config.endpoints, k) not in (None, False))
        msg = (
            f"{loaded.source}: node.serve stands beside endpoints.{kind}, where somebody else "
            "serves, and nothing is started twice; leave one of them out"
        )
        raise ConfigurationError(msg)
    settings: dict[str, Any] = {f"endpoints.{k}": None for k in (*ENDPOINT_KINDS, *HOSTS_ONLY_KEYS)}
    settings["endpoints.file"] = str(path / "cluster" / "servers")
    if not loaded.config.backend.node_endpoints:  # else the coordinator asks, and awaits, nobody
        wanted, own = order.nodes * loaded.config.node.instances, loaded.config.endpoints
        least = own.least if own.least > 1 else max(1, wanted // 2)
        settings["endpoints.least"] = min(least, wanted)  # a job before may have had more nodes
        settings["endpoints.wait_s"] = own.wait_s or loaded.config.node.timeout_s
    if get_at_path(loaded.raw, ("limits", "fleet_wait_s")) is None:  # as long as a restart may take
        settings["limits.fleet_wait_s"] = loaded.config.node.timeout_s
    own_cards = loaded.config.node.accelerators
    if site.accelerators is not None and own_cards.variable == "none":
        settings["node.accelerators.variable"] = site.accelerators.variable
        settings["node.accelerators.count"] = site.accelerators.per_node
    return settings


def _make_job_plan(
    loaded: LoadedConfig, path: Path, order: SubmitOptions, site: SiteConfig
) -> JobPlan:
    archive = order.archive.resolve() if order.archive else None
    if archive is not None and not archive.is_file():
        raise ConfigurationError(
            f"--pack {archive}: no such file; make it by: fanfold pack -o FILE"
        )
    if archive is not None and (reason := find_path_risk(archive)) is not None:
        raise ConfigurationError(f"--pack: the jobs would run what others can change: {reason}")
    backend = loaded.config.backend
    return JobPlan(
        run=path,
        name=loaded.config.name,
        command=(sys.executable, "-P", "-m", "fanfold"),  # Slurm begins in anybody's folder
        site=site,
        nodes=order.nodes,
        walltime_s=parse_walltime(order.walltime),
        drain_s=loaded.config.limits.drain_s + (STOP_GRACE_S if backend.is_remote else 0.0),
        starts_servers=loaded.config.node.serve is not None,
        starts_workers=backend.starts_workers_on_nodes and backend.command is None,
        queue=order.queue,
        account=order.account,
        archive=archive,
    )


def _check_bounds(plan: JobPlan, order: SubmitOptions, loaded: LoadedConfig) -> None:
    """Check that the first job keeps within the chain's node-hours, and has time for items.

    Raises:
        ConfigurationError: It alone may take more, or its end takes all of it.
    """
    kept = plan.reserve_s + plan.drain_s + loaded.config.limits.margin_s
    if kept >= plan.walltime_s:
        msg = (
            f"--walltime {order.walltime}: {kept:g} s of it are kept for its end (reserve_s of the "
            "site, limits.drain_s and margin_s), and none are left; give more"
        )
        raise ConfigurationError(msg)
    due = plan.nodes * plan.walltime_s / 3600
    if order.node_hours is not None and due > order.node_hours:
        msg = (
            f"--node-hours {order.node_hours:g}: one job of {plan.nodes} nodes may take {due:.2f}; "
            "give fewer nodes, a shorter --walltime or more node-hours"
        )
        raise ConfigurationError(msg)


def _show(plan: JobPlan) -> None:
    shown = [f"# {plan.folder}/{name}\n{text}" for name, text in _scripts(plan).items()]
    print("\n".join(shown), end="")


def _scripts(plan: JobPlan) -> dict[str, str]:
    """Return the job's script and those that it needs, by their files' names."""
    scripts = {"job.sh": job_script(plan)}
    if plan.starts_servers:
        scripts["node.sh"] = node_script(plan)
    if plan.starts_workers:
        scripts |= {"launch.sh": launch_script(plan), "worker.sh": worker_script(plan)}
    return scripts


def _check_no_job(file: ChainFile, asked: Scheduler) -> None:
    """Check that no job of the run is waiting or running; note those that are gone.

    Raises:
        ConfigurationError: One is.
    """
    chain = file.read()
    states = asked.fetch_states([job.id for job in chain.unfinished_jobs()])
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
        script.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it


def _submit_first(plan: JobPlan, order: SubmitOptions) -> str:
    try:
        job = make_scheduler(plan.site.scheduler).submit(plan.folder / "job.sh")
    except (BackendError, ConfigurationError) as error:
        msg = f"{error.message}\nThe run folder is ready; try again: fanfold submit {plan.run} …"
        raise type(error)(msg) from None
    terms = {
        "site": plan.site.name,
        "scheduler": plan.site.scheduler,
        "jobs": order.jobs,
        "node_hours": order.node_hours,
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


def _about(plan: JobPlan, job: str, loaded: LoadedConfig, order: SubmitOptions) -> Iterator[str]:
    found = RunFolder(plan.run).read_provenance()["input"]
    yield f"{found['items']:,} items from {found['source']}; run folder {plan.run}"
    yield f"job {job} is submitted: {plan.nodes} nodes, {plan.walltime_s / 3600:g} h at most"
    yield _bounds(order)
    yield f"site {plan.site.name}: {plan.site.tested}; its script: {plan.folder}/job.sh"
    yield from (f"note: {hint}" for hint in plan.site.hints)
    servers, streams = plan.nodes * loaded.config.node.instances, loaded.config.limits.streams
    if plan.starts_servers and streams < servers * _BATCH:
        yield (
            f"note: limits.streams is {streams:,}, so {servers:,} servers have "
            f"{streams / servers:,.0f} items each at a time; their batches may take more"
        )
    if names := sorted(set(_VARIABLE.findall(str(loaded.plain)))):
        yield (
            f"note: the job must find {', '.join(names)} in its environment; where the scheduler "
            "does not pass it on, let 'setup' of a site file read it from a file of yours"
        )
    yield f"fanfold status {plan.run}   fanfold cancel {plan.run}"


def _bounds(order: SubmitOptions) -> str:
    """Say when the chain ends."""
    given = [f"after {order.jobs:,} jobs"] if order.jobs is not None else []
    if order.node_hours is not None:
        given.append(f"before {order.node_hours:g} node-hours are used up")
    others = ", ".join(given) or "nothing else bounds it (--jobs, --node-hours)"
    return (
        f"others follow it until all items are finished, or {MAX_IDLE_JOBS} jobs in a row finish "
        "none; "
        f"{others}"
    )
