"""Commands on runs that are there: what they do, their log, stopping them, their report. Registered by cli.py."""

from typing import Annotated

import typer

from smolray.cli.options import Address, Name, Storage, console, errors, jobs, plain
from smolray.run import status as runs
from smolray.storage import absolute, exists, join


def status(
    name: Annotated[str | None, typer.Argument(help="a run; without: all of them")] = None, storage: Storage = "runs"
) -> None:
    """What the runs are doing."""
    from smolray.cli.tables import run_details, runs_table

    if name:
        console.print(run_details(runs.run_status(runs.require_run(storage, name))))
        return
    found = runs.list_runs(storage)
    console.print(runs_table(found) if found else f"no runs under {plain(storage)}")


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run ends")] = False,
    storage: Storage = "runs",
) -> None:
    """The progress of a run, a line an event."""
    from smolray.run.events import read_events
    from smolray.run.progress import event_line

    run_dir, total = runs.require_run(storage, name), None
    for event in runs.follow_events(run_dir) if follow else read_events(run_dir):
        total = event.get("total_steps", total)
        typer.echo(event_line(event, total))


def stop(
    name: Name,
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until it has saved")] = 300.0,
    address: Address = None,
    patience: Annotated[float, typer.Option(min=0, help="seconds the job may take to end by itself after that")] = 30.0,
    storage: Storage = "runs",
) -> None:
    """Ask a run, or all trials of a search, to save and stop; with --address end its Ray job after that."""
    from smolray.tune.log import FILE, search_folder

    client = jobs(address) if address else None
    if exists(join(folder := search_folder(storage, name), FILE)):
        _stop_search(folder, wait)
    else:
        _stop_run(runs.require_run(storage, name), wait)
    if client is not None:
        from smolray.cluster.jobs import stop_jobs

        for line in stop_jobs(client, name, absolute(storage), patience) or [
            f"no job of {name} is active at {address}"
        ]:
            console.print(plain(line))


def _stop_search(folder: str, wait: float) -> None:
    from smolray.run.events import read_events
    from smolray.run.progress import duration
    from smolray.tune.log import FILE

    before = read_events(folder, FILE)
    if before[-1]["event"] == "over":
        console.print(f"{folder} is not running: its last session has ended")
        return
    runs.request_stop(folder)
    if runs.wait_for_end(folder, len(before), wait, file=FILE, kind="over") is None:
        errors.print(
            f"{folder} has not stopped within {duration(wait)}. The request stays: its trials save and stop when they look next",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    console.print(f"{folder} stopped; `smolray tune` under the same name goes on with it", soft_wrap=True)


def _stop_run(run_dir: str, wait: float) -> None:
    from smolray.run.events import read_events
    from smolray.run.progress import duration

    name = run_dir.rstrip("/").rsplit("/", 1)[-1]
    seen, before = len(read_events(run_dir)), runs.run_status(run_dir)
    if before.ended:
        console.print(f"{name} has {before.state} already, at step {before.step}")
    else:
        runs.request_stop(run_dir)
        end = runs.wait_for_end(run_dir, seen, wait)
        if end is None:
            last = (
                f"its last event is {duration(before.stalled_seconds)} old"
                if before.stalled_seconds
                else "it was running"
            )
            errors.print(
                f"{name} has not stopped within {duration(wait)} ({last}). The request stays: it saves and stops when it looks next; "
                f"`smolray resume {name}` takes it back.",
                soft_wrap=True,
            )
            raise typer.Exit(1)
        runs.clear_stop(run_dir)  # answered: a later launch of this name must not meet it
        saved = runs.run_status(run_dir).last_checkpoint
        console.print(
            f"{name} {end.get('status')} at step {end.get('step')}{f', saved as {plain(saved)}' if saved else ''}",
            soft_wrap=True,
        )


def report(name: Name, storage: Storage = "runs") -> None:
    """Write the HTML report of a run anew."""
    run_dir = runs.require_run(storage, name)
    from smolray.report.run import write_report

    console.print(plain(write_report(run_dir)), soft_wrap=True)


def tensorboard(
    name: Name, out: Annotated[str, typer.Option(help="a new local folder")], storage: Storage = "runs"
) -> None:
    """Export the curves of a run for TensorBoard."""
    points = runs.export_tensorboard(runs.require_run(storage, name), out)
    console.print(f"{points:,} points in {plain(out)}", soft_wrap=True)
