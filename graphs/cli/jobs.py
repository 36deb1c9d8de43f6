"""``fanfold submit``, ``cancel``, ``pack``, and the commands that a job script calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..run.console import print_messages
from .options import (
    Command,
    Group,
    argument,
    flag,
    nonempty,
    number_option,
    path_option,
    take_folder,
    take_out,
    take_overrides,
)

if TYPE_CHECKING:
    from ...configs.overrides import Overrides

chain = Group("chain", help="Commands that the job script calls.", hidden=True)

take_job = click.option("--job", metavar="TEXT", required=True, help="Scheduler id of this job.")


@click.command(cls=Command)
@argument("config", "CONFIG|PRESET|DIR", "Settings, or a run to resume.", type=nonempty)
@click.option("--site", metavar="NAME|FILE", required=True, help="Cluster: a name or a site file.")
@number_option("--nodes", required=True, about="Nodes per job.")
@click.option("--walltime", metavar="TIME", required=True, help="Time limit per job: 2h, 90m.")
@click.option("--queue", metavar="NAME", help="Queue, partition or QOS.")
@click.option("--account", metavar="NAME", help="Allocation to charge.")
@take_out
@number_option("--jobs", about="Maximum jobs in the chain.")
@click.option(
    "--node-hours", metavar="N", type=click.FloatRange(0), help="Maximum node-hours of the chain."
)
@path_option("pack", "--pack", about="Unpack this environment archive on the nodes first.")
@take_overrides("input_path", "limit", "assignments")
@flag("--dry-run", about="Print the script; submit nothing.")
def submit(  # noqa: PLR0913 - click passes one argument per option
    *,
    config: str,
    site: str,
    nodes: int,
    walltime: str,
    queue: str | None,
    account: str | None,
    out: Path | None,
    jobs: int | None,
    node_hours: float | None,
    pack: Path | None,
    changes: Overrides,
    dry_run: bool,
) -> None:
    """Run a batch as a chain of cluster jobs, each submitting the next until all is finished."""
    from ..jobs.submit import SubmitOptions, submit_job

    options = SubmitOptions(site, nodes, walltime, queue, account, jobs, node_hours, pack)
    submit_job(config, out, changes, options, dry_run)


@click.command(cls=Command)
@take_folder
@flag("--now", about="Kill running jobs instead of letting them drain.")
def cancel(folder: Path, now: bool) -> None:
    """Cancel the jobs of a run; no job follows them."""
    from ..jobs.chain import cancel_jobs

    cancel_jobs(folder, now)


@click.command(cls=Command)
@path_option(
    "target",
    "-o",
    "--output",
    default=Path("fanfold-env.tar.gz"),
    about="Archive to write: ….tar.gz or ….tar.",
)
@click.option("--without", metavar="PACKAGE", multiple=True, help="Exclude this package.")
def pack(target: Path, without: Sequence[str]) -> None:
    """Pack this Python environment into one archive, to unpack on nodes."""
    from ...backends.cluster.environment import pack_environment

    packed = pack_environment(target, list(without))
    print_messages(
        [
            f"{packed.path}: {len(packed.packages)} packages in {packed.files:,} files, "
            f"{packed.size / 1e6:,.0f} MB",
            "unpack it anywhere on the same kind of machine, then run: bin/fanfold --version",
        ]
    )


@chain.command()
@take_folder
@take_job
def begin(folder: Path, job: str) -> int:
    """Record that a job starts, and submit its successor."""
    from ..jobs.chain import begin_job

    return begin_job(folder, job)


@chain.command()
@take_folder
@take_job
@click.option("--code", metavar="N", type=int, required=True, help="Exit code of the job's run.")
@flag("--unserved", about="No model server was left.")
def end(folder: Path, job: str, code: int, unserved: bool) -> int:
    """Record how a job ended; submit or withdraw its successor."""
    from ..jobs.chain import end_job

    return end_job(folder, job, code, unserved)
