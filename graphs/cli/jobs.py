"""``fanfold submit``, ``cancel`` and what a job calls: the command line of batch jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..run.console import print_messages
from .options import Folder, Input, Limit, Out, Sets, nonempty, nonempty_path

chain = typer.Typer(help="What the job script calls.", no_args_is_help=True, hidden=True)

JobId = Annotated[str, typer.Option("--job", help="The scheduler's name of this job.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to fanfold's."""
    app.command()(submit)
    app.command()(cancel)
    app.command()(pack)
    app.add_typer(chain, name="chain")


def submit(  # noqa: PLR0913, PLR0917 - typer wants one parameter per option
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|PRESET|DIR", parser=nonempty, help="Settings, or a run to go on with."
        ),
    ],
    site: Annotated[
        str, typer.Option("--site", metavar="NAME|FILE", help="The cluster: a name or a site file.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of each job.")],
    walltime: Annotated[str, typer.Option("--walltime", help="Most time of each job: 2h, 90m.")],
    queue: Annotated[str | None, typer.Option("--queue", help="Queue, partition or QOS.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Allocation to charge.")] = None,
    out: Out = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Most jobs of the chain.")
    ] = None,
    node_hours: Annotated[
        float | None, typer.Option("--node-hours", min=0, help="Most node-hours of the chain.")
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            "--pack",
            metavar="FILE",
            parser=nonempty_path,
            help="Copy this environment to the nodes first.",
        ),
    ] = None,
    input_path: Input = None,
    limit: Limit = None,
    overrides: Sets = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script; submit nothing.")
    ] = False,
) -> None:
    """Run a batch by jobs of a cluster that follow each other until it is finished."""
    from ...configs.resolve import Overrides
    from ..jobs.submit import SubmitOptions
    from ..jobs.submit import submit_job as submitting_submit

    wish = Overrides(overrides or [], input_path, limit)
    order = SubmitOptions(site, nodes, walltime, queue, account, jobs, node_hours, pack)
    submitting_submit(config, out, wish, order, dry_run)


def cancel(
    folder: Folder,
    now: Annotated[
        bool, typer.Option("--now", help="Have the scheduler end running jobs at once.")
    ] = False,
) -> None:
    """End the jobs of a run; no other follows."""
    from ..jobs.chain import cancel_jobs as cancelling_cancel

    cancelling_cancel(folder, now)


def pack(
    target: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", parser=nonempty_path, help="….tar.gz, or ….tar."
        ),
    ] = Path("fanfold-env.tar.gz"),
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PACKAGE", help="Leave this package out."),
    ] = None,
) -> None:
    """Write one archive of this Python with its packages, to unpack on nodes."""
    from ...backends.cluster.environment import pack_environment as pack_pack

    packed = pack_pack(target, without or [])
    print_messages(
        [
            f"{packed.path}: {len(packed.packages)} packages in {packed.files:,} files, "
            f"{packed.size / 1e6:,.0f} MB",
            "unpack it anywhere on the same kind of machine, then: bin/fanfold --version",
        ]
    )


@chain.command()
def begin(folder: Folder, job: JobId) -> None:
    """Note that a job begins, and submit its successor."""
    from ..jobs.chain import begin_job as chaining_begin

    raise typer.Exit(chaining_begin(folder, job))


@chain.command()
def end(
    folder: Folder,
    job: JobId,
    code: Annotated[int, typer.Option("--code", help="Exit code of the job's run.")],
    unserved: Annotated[
        bool, typer.Option("--unserved", help="No model server was left before it ended.")
    ] = False,
) -> None:
    """Note how a job ended; see that another follows, or that none does."""
    from ..jobs.chain import end_job as chaining_end

    raise typer.Exit(chaining_end(folder, job, code, unserved))
