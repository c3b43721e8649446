"""Commands for runs that have been started: `smolray status`, `logs` and `stop`."""

from typing import Annotated

import typer

from smolray.cli.options import Address, Name, Storage, console, errors, job_client, plain
from smolray.run import status as run_state
from smolray.run.events import read_events
from smolray.run.folder import RunFolder, has_log
from smolray.run.progress import duration, event_line
from smolray.run.queue import read_queue
from smolray.run.result import reading
from smolray.storage import absolute


def status(
    name: Annotated[str | None, typer.Argument(help="a run; without: all of them")] = None, storage: Storage = "runs"
) -> None:
    """Show what your runs are doing: step, loss, speed, time left."""
    from smolray.cli.tables import run_details, runs_table

    if name:
        console.print(run_details(run_state.run_status(run_state.require_run(storage, name))))
        return
    found = run_state.list_runs(storage)
    console.print(runs_table(found) if found else f"no runs under {plain(storage)}")


def queue(storage: Storage = "runs") -> None:
    """Show the runs that stand in line or train, in their order."""
    from smolray.cli.tables import queue_table

    found = read_queue(storage)
    console.print(queue_table(found) if found else f"no run is queued under {plain(storage)}")


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="continue until the run ends")] = False,
    storage: Storage = "runs",
) -> None:
    """Print the progress of a run, one line for each event.

    The output of the workers stays on their nodes: the line `launch` of a run says where.
    """
    run_dir, total = run_state.require_run(storage, name), None
    with reading(run_dir):
        for event in run_state.follow_events(run_dir) if follow else read_events(run_dir):
            total = event.get("total_steps", total)
            typer.echo(event_line(event, total))


def stop(
    name: Name,
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until it has saved")] = 300.0,
    address: Address = None,
    patience: Annotated[float, typer.Option(min=0, help="seconds the job may take to end by itself after that")] = 30.0,
    storage: Storage = "runs",
) -> None:
    """Ask a run or a search to save and stop.

    With --address its Ray job is also stopped, unless it ends by itself.
    """
    from smolray.tune.log import FILE, search_folder

    client = job_client(address) if address else None
    if has_log(folder := search_folder(storage, name), FILE):
        _stop_search(folder, wait)
    else:
        _stop_run(run_state.require_run(storage, name), wait)
    if client is None:
        return

    from smolray.cluster.jobs import stop_jobs

    lines = stop_jobs(client, name, absolute(storage), patience)
    for line in lines or [f"no job of {name} is active at {address}"]:
        console.print(plain(line))


def _stop_search(folder: str, wait: float) -> None:
    from smolray.tune.log import FILE

    before = read_events(folder, FILE)
    if before[-1]["event"] == "over":
        console.print(f"{folder} is not running: its last session has ended")
        return

    run_state.request_stop(folder)
    if run_state.wait_for_end(folder, len(before), wait, file=FILE, kind="over") is None:
        errors.print(
            f"{folder} has not stopped within {duration(wait)}. "
            "The request stays: its trials save and stop when they next look for it",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    console.print(f"{folder} stopped; re-run `smolray tune` with the same name to resume", soft_wrap=True)


def _stop_run(run_dir: str, wait: float) -> None:
    name = RunFolder(run_dir).name
    seen, before = len(read_events(run_dir)), run_state.run_status(run_dir)
    if before.ended:
        console.print(f"{name} has {before.state} already, at step {before.step}")
        return
    if before.state == "lost":
        console.print(
            f"{name} is not running: its driver is gone ({plain(before.driver or '')}), at step {before.step}; "
            f"`smolray resume {name}` goes on from its newest checkpoint",
            soft_wrap=True,
        )
        return

    run_state.request_stop(run_dir)
    end = run_state.wait_for_end(run_dir, seen, wait)
    if end is None:
        quiet = before.stalled_seconds
        last = f"its last event is {duration(quiet)} old" if quiet else "it was running"
        errors.print(
            f"{name} has not stopped within {duration(wait)} ({last}). The request stays: "
            f"the run saves and stops when it next looks for it; `smolray resume {name}` withdraws it.",
            soft_wrap=True,
        )
        raise typer.Exit(1)

    run_state.clear_stop(run_dir)  # it has been served: a later launch of this name must not find it
    saved = run_state.run_status(run_dir).last_checkpoint
    where = f", saved as {plain(saved)}" if saved else ""
    console.print(f"{name} {end.get('status')} at step {end.get('step')}{where}", soft_wrap=True)
