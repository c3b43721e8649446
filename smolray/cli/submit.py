"""The command `smolray submit`: a run as a job on a Ray cluster."""

import getpass
from typing import Annotated, Any

import typer

from smolray.cli.options import ConfigFile, Overrides, console, errors, job_client, plain
from smolray.config import RunConfig, load_config
from smolray.run.status import clear_stop, run_status


def submit(
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="job server of a cluster, such as http://head:8265")
    ],
    config: ConfigFile = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="print the job's output until it ends")] = False,
    keep_alive: Annotated[
        bool,
        typer.Option("--keep-alive", help="keep watching, and submit it again when its driver is lost with the head"),
    ] = False,
    queue: Annotated[
        bool, typer.Option("--queue", help="let it stand in line until what it asks for is free (`smolray queue`)")
    ] = False,
) -> None:
    """Submit a run to a cluster as a Ray job.

    Example: smolray submit --address http://head:8265 --config run.yaml
    """
    given = [*(overrides or ()), *(["resources.queue=true"] if queue else [])]
    run = load_config(config, given)
    arguments = [*(["--config", config] if config else []), *given]
    if run.resources.queue and not run.resources.user:
        arguments.append(f"resources.user={getpass.getuser()}")

    from smolray.cluster.jobs import check_submission

    check_submission(run, arguments)
    if not keep_alive:
        submit_run(job_client(address), run, arguments, follow)
        return

    from smolray.cluster import resubmit

    client = job_client(address)
    clear_stop(run.run_dir)
    for text in resubmit.submit_until_ended(client, run, arguments):
        typer.echo(text, nl=False)
    raise typer.Exit(int(run_status(run.run_dir).state == "failed"))


def submit_run(client: Any, run: RunConfig, arguments: list[str], follow: bool) -> None:
    """Submit the run and say so; with `follow` print the job's output, and exit with code 1 where it fails."""
    from smolray.cluster import jobs

    job_id = jobs.submit(client, run, arguments)
    clear_stop(
        run.run_dir
    )  # only after the cluster has accepted the job: if it refuses, a running run must still find the request
    console.print(
        f"submitted {job_id}; see `smolray status {run.name} --storage {plain(run.storage)}`",
        soft_wrap=True,
    )
    if not follow:
        return

    printed = False
    for text in jobs.follow(client, job_id):
        typer.echo(text, nl=False)
        printed = True
    job = client.get_job_info(job_id)
    console.print(f"{job_id} {job.status.value}")
    if job.status.value != "SUCCEEDED":
        if not printed:  # it did not begin, and Ray knows why
            errors.print(plain((job.message or "").strip()[-2000:]), soft_wrap=True)
        raise typer.Exit(1)
