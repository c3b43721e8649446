"""Commands that train or plan a training: `smolray train`, `resume`, `plan` and `tune`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from smolray.cli.options import (
    Address,
    ConfigFile,
    Name,
    Overrides,
    Storage,
    console,
    errors,
    job_client,
    plain,
    stored_config,
)
from smolray.config import ConfigError, RunConfig, load_config
from smolray.run.status import clear_stop
from smolray.storage import join


def train(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Train, evaluate and report; re-run with the same name to resume."""
    from smolray.data.prepare import check_sources

    run = load_config(config, overrides or ())
    check_sources(run)
    launch(run)


def resume(
    name: Name,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="with --address: print the job's output")] = False,
    storage: Storage = "runs",
) -> None:
    """Resume a run from its newest checkpoint, here or (--address) on a cluster."""
    client = job_client(address) if address else None
    run, arguments = stored_config(name, storage, overrides)
    if client is None:
        clear_stop(run.run_dir)
        launch(run)
        return

    from smolray.cli.submit import submit_run
    from smolray.cluster.jobs import check_submission

    check_submission(run, arguments)
    submit_run(client, run, arguments, follow)


def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    inventory: Annotated[
        str | None,
        typer.Option(
            help="GPUs and links: '2x rtx4090 @ 10GbE, 1x rtx3060', or a YAML file; default: this cluster's, measured"
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="train a few steps of the chosen plan on this cluster and compare")
    ] = False,
    calibration: Annotated[
        str | None, typer.Option(help="gpu.json of `make gpu`: what it measured of a GPU replaces estimates")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="file to write the plan to")] = None,
) -> None:
    """Show which strategies fit your GPUs, how fast each is, and which to take.

    With --inventory it needs no GPU and no cluster.
    """
    run = load_config(config, overrides or ())
    if measure and inventory:
        raise ConfigError(
            "--measure trains on the GPUs of this cluster, but --inventory describes other GPUs: use one of the two"
        )

    if measure and calibration:
        raise ConfigError("--measure measures the GPUs itself: use it or --calibration")

    from smolray.planner.describe import strategies_table, to_json, words

    if measure:
        from smolray.launch.measure import measure_plan, measurement_table

        found, measured = measure_plan(run)
    else:
        found, measured = _planned(run, inventory, calibration), None

    console.print(strategies_table(found))
    console.print(plain(words(found)), soft_wrap=True)
    if measured is not None:
        console.print(measurement_table(found, measured))
    if json_file:
        record = to_json(found) | ({"measured": measured.to_json()} if measured else {})
        Path(json_file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tune(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Search for hyperparameters; re-run with the same name to resume."""
    from smolray.data.prepare import check_sources

    run = load_config(config, overrides or ())
    check_sources(run)

    from smolray.tune.console import result_lines
    from smolray.tune.run import search_run

    result = search_run(run)
    for line in result_lines(result, join(run.storage, run.name)):
        console.print(plain(line), soft_wrap=True)


def launch(run: RunConfig) -> None:
    """Train on this machine or the cluster that RAY_ADDRESS names, and print the result."""
    from smolray.launch.session import started_run

    with started_run(run) as session:
        from smolray.launch.driver import train_run  # Ray and torch: the run is known already

        result = train_run(session)

    from smolray.cli.tables import accuracy_table

    console.print(accuracy_table(result))
    console.print(f"{plain(run.run_dir)}: {plain(str(result.get('status', 'finished')))}", soft_wrap=True)


def _planned(run: RunConfig, inventory: str | None, calibration: str | None) -> Any:
    """The plan for described GPUs, or for those of the cluster."""
    from smolray.planner.calibration import calibrated
    from smolray.planner.inventory import load
    from smolray.planner.plan import make_plan

    if inventory is not None:
        described = load(inventory)
        return make_plan(run, _statistics(run), calibrated(described, calibration) if calibration else described)

    from smolray.cluster.connect import connect
    from smolray.launch.driver import look

    statistics = _statistics(run)
    connect()
    seen = look(run).inventory()
    return make_plan(run, statistics, calibrated(seen, calibration) if calibration else seen)


def _statistics(run: RunConfig) -> Any:
    """The sizes of the data for the planner: counted where the data is prepared and indexed, else assumed."""
    from smolray.planner.statistics import DataStatistics

    if run.data.train:
        from smolray.data.prepare import shard_folder
        from smolray.data.ray_jobs import load_index
        from smolray.data.shards import ShardError, read_manifest
        from smolray.data.sources import repeats_of

        folder = shard_folder(run, "train")
        try:
            read_manifest(folder)  # first: without shards nothing of the model is loaded
            index = load_index(folder, run)
            return DataStatistics.from_index(index, repeats_of(run.data, index))
        except (ShardError, FileNotFoundError):
            errors.print("the data is not prepared and indexed yet: its sizes are assumed", style="yellow")

    from smolray.planner.model_files import shape_of

    return DataStatistics.default(run, shape_of(run.model))
