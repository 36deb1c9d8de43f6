"""``fanfold submit``, ``cancel``, ``pack``, and the commands that a job script calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..run.console import print_messages
from .options import Folder, Out, nonempty, nonempty_path, take_overrides

if TYPE_CHECKING:
    from ...configs.resolve import Overrides

chain = typer.Typer(help="Commands that the job script calls.", no_args_is_help=True, hidden=True)

JobId = Annotated[str, typer.Option("--job", help="Scheduler id of this job.")]


def add_commands(app: typer.Typer) -> None:
    """Register the job commands."""
    app.command()(submit)
    app.command()(cancel)
    app.command()(pack)
    app.add_typer(chain, name="chain")


@take_overrides("input_path", "limit", "assignments")
def submit(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|PRESET|DIR", parser=nonempty, help="Settings, or a run to resume."
        ),
    ],
    site: Annotated[
        str, typer.Option("--site", metavar="NAME|FILE", help="Cluster: a name or a site file.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes per job.")],
    walltime: Annotated[
        str, typer.Option("--walltime", metavar="TIME", help="Time limit per job: 2h, 90m.")
    ],
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="NAME", help="Queue, partition or QOS.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--account", metavar="NAME", help="Allocation to charge.")
    ] = None,
    out: Out = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Maximum jobs in the chain.")
    ] = None,
    node_hours: Annotated[
        float | None, typer.Option("--node-hours", min=0, help="Maximum node-hours of the chain.")
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            "--pack",
            metavar="FILE",
            parser=nonempty_path,
            help="Unpack this environment archive on the nodes first.",
        ),
    ] = None,
    *,
    changes: Overrides,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script; submit nothing.")
    ] = False,
) -> None:
    """Run a batch as a chain of cluster jobs, each submitting the next until all is finished."""
    from ..jobs.submit import SubmitOptions, submit_job

    options = SubmitOptions(site, nodes, walltime, queue, account, jobs, node_hours, pack)
    submit_job(config, out, changes, options, dry_run)


def cancel(
    folder: Folder,
    now: Annotated[
        bool, typer.Option("--now", help="Kill running jobs instead of letting them drain.")
    ] = False,
) -> None:
    """Cancel the jobs of a run; no job follows them."""
    from ..jobs.chain import cancel_jobs

    cancel_jobs(folder, now)


def pack(
    target: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            parser=nonempty_path,
            help="Archive to write: ….tar.gz or ….tar.",
        ),
    ] = Path("fanfold-env.tar.gz"),
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PACKAGE", help="Exclude this package."),
    ] = None,
) -> None:
    """Pack this Python environment into one archive, to unpack on nodes."""
    from ...backends.cluster.environment import pack_environment

    packed = pack_environment(target, without or [])
    print_messages(
        [
            f"{packed.path}: {len(packed.packages)} packages in {packed.files:,} files, "
            f"{packed.size / 1e6:,.0f} MB",
            "unpack it anywhere on the same kind of machine, then run: bin/fanfold --version",
        ]
    )


@chain.command()
def begin(folder: Folder, job: JobId) -> None:
    """Record that a job starts, and submit its successor."""
    from ..jobs.chain import begin_job

    raise typer.Exit(begin_job(folder, job))


@chain.command()
def end(
    folder: Folder,
    job: JobId,
    code: Annotated[int, typer.Option("--code", help="Exit code of the job's run.")],
    unserved: Annotated[bool, typer.Option("--unserved", help="No model server was left.")] = False,
) -> None:
    """Record how a job ended; submit or withdraw its successor."""
    from ..jobs.chain import end_job

    raise typer.Exit(end_job(folder, job, code, unserved))
