"""The command `smolray`: thin commands over the package.

What needs Ray or torch imports them itself, so the rest starts at once.

Errors of our own modules are one message and exit code 2; `--debug` shows where they come from.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smolray import config as configs
from smolray.cli import cluster as cli_cluster
from smolray.cli import generate as cli_generate
from smolray.cli import runs as cli_runs
from smolray.cli import search as cli_search
from smolray.cli.options import Address, ConfigFile, Name, Overrides, Storage, console, errors, jobs, plain
from smolray.run import status as runs
from smolray.storage import absolute, join


class _CleanErrors(TyperGroup):
    """Prints an error that names its own remedy without a traceback; a fault in the program keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
            if ctx.params.get("debug") or not _is_told(cause):
                raise
            errors.print(f"[red]error:[/red] {plain(str(cause) or type(cause).__name__)}", soft_wrap=True)
            raise typer.Exit(2) from None


def _is_told(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(c.__module__.split(".")[0] == "smolray" for c in type(error).__mro__)


app = typer.Typer(cls=_CleanErrors, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
config_app = typer.Typer(no_args_is_help=True, help="Show a resolved run, or the schema of its settings.")
app.add_typer(config_app, name="config")
app.command("doctor")(cli_cluster.doctor)
for command in (cli_runs.status, cli_runs.logs, cli_runs.stop, cli_runs.report, cli_runs.tensorboard):
    app.command()(command)
app.command("generate")(cli_generate.generate)
app.add_typer(cli_cluster.cluster_app, name="cluster")
app.add_typer(cli_cluster.k8s_app, name="k8s")
app.add_typer(cli_search.search_app, name="search")


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Fine-tune small vision-language models over whatever GPUs you own."""


@app.command()
def prepare(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Turn raw data into shards: smolray prepare data.train=/data/vqav2 out=s3://bucket/shards"""
    settings = [f"data.shards={o.removeprefix('out=')}" if o.startswith("out=") else o for o in overrides or ()]
    run = configs.load_config(config, settings)
    if not run.data.train:
        raise configs.ConfigError(
            "data.train = '': nothing to prepare; give data.train=PATH, a URI or a hub data set id"
        )
    from smolray.cli.tables import manifests_table
    from smolray.cluster.connect import connect
    from smolray.data.prepare import prepare_run

    connect()
    manifests = prepare_run(run)
    console.print(manifests_table(manifests))
    console.print(f"shards: {plain(run.shards_dir)}")


@app.command()
def preview(
    overrides: Overrides = None,
    config: ConfigFile = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="samples shown")] = 5,
) -> None:
    """Samples as the model will meet them, the «trained tokens» marked, and the lengths of the prepared data; takes no
    GPU.
    """
    run = configs.load_config(config, overrides or ())
    from smolray.cli import preview as previews

    for item in previews.preview(run, count):
        console.print(previews.item_text(item), soft_wrap=True)
        console.print()
    console.print(previews.lengths_table(previews.lengths(run)))


@app.command()
def train(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Train, evaluate and report; the same name again resumes the run."""
    _launch(configs.load_config(config, overrides or ()))


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    inventory: Annotated[
        str | None,
        typer.Option(
            help="cards and links: '2x rtx4090 @ 10GbE, 1x rtx3060', or a YAML file; default: this cluster's, measured"
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="train a few steps of the chosen plan on this cluster and compare")
    ] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="file to write the plan to")] = None,
) -> None:
    """Which strategies fit on these cards, how fast each would be, and which to take; with --inventory it takes no GPU."""
    run = configs.load_config(config, overrides or ())
    if measure and inventory:
        raise configs.ConfigError(
            "--measure trains on the cards of this cluster, --inventory describes others: leave one of them out"
        )
    import json
    from pathlib import Path

    from smolray.planner.describe import strategies_table, to_json, words

    if measure:
        from smolray.launch.measure import beside_table, measure_plan

        found, measured = measure_plan(run)
    else:
        found, measured = _planned(run, inventory), None
    console.print(strategies_table(found))
    console.print(plain(words(found)), soft_wrap=True)
    if measured is not None:
        console.print(beside_table(found, measured))
    if json_file:
        record = to_json(found) | ({"measured": measured.to_json()} if measured else {})
        Path(json_file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@app.command()
def tune(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Search for hyperparameters; the same name again goes on."""
    run = configs.load_config(config, overrides or ())
    from smolray.tune.console import result_lines
    from smolray.tune.run import search_run

    result = search_run(run)
    for line in result_lines(result, join(run.storage, run.name)):
        console.print(plain(line), soft_wrap=True)


@app.command()
def evaluate(
    name: Name,
    checkpoint: Annotated[str | None, typer.Option(help="default: the best, else the newest")] = None,
    storage: Storage = "runs",
) -> None:
    """Decode the validation questions of a run and print the accuracy by type."""
    run, _ = _stored_config(name, storage, ())
    from smolray.cli.tables import accuracy_table, metrics_table
    from smolray.launch.driver import evaluate_run

    result = evaluate_run(run, checkpoint)
    console.print(accuracy_table(result))
    console.print(metrics_table(result.get("metrics") or {}))


@app.command()
def compare(
    name: Name,
    other: Annotated[str | None, typer.Argument(help="a second run; without: two evaluations of the first")] = None,
    a: Annotated[
        int | None, typer.Option("--a", help="step of the first; default: the newest, within one run the one before b")
    ] = None,
    b: Annotated[int | None, typer.Option("--b", help="step of the second; default: the newest")] = None,
    metric: Annotated[str, typer.Option(help="one of those of evaluate.metrics")] = "exact_match",
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, help="questions shown of those gained, and of those lost")
    ] = 10,
    storage: Storage = "runs",
) -> None:
    """Two evaluations side by side, question by question: smolray compare RUN [OTHER] --a STEP --b STEP"""
    first = runs.require_run(storage, name)
    second = runs.require_run(storage, other) if other else first
    from smolray.cli.tables import changes_table, comparison_table
    from smolray.evaluate.compare import compare_runs

    found = compare_runs(first, second, a, b, metric)
    console.print(comparison_table(found))
    console.print(changes_table(found, limit))
    if found.only_a or found.only_b:
        console.print(f"left out: {found.only_a:,} questions that only a has, {found.only_b:,} that only b has")


@app.command()
def export(
    name: Name,
    out: Annotated[str | None, typer.Option(help="default: <run>/export")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="default: the best, else the newest")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the adapters alone, for PEFT")] = False,
    storage: Storage = "runs",
) -> None:
    """Write a folder that transformers loads, or with --adapter PEFT."""
    run_dir = runs.require_run(storage, name)
    from smolray.export import export_adapter, export_run

    console.print(plain((export_adapter if adapter else export_run)(run_dir, out, checkpoint)), soft_wrap=True)


@app.command()
def resume(
    name: Name, overrides: Overrides = None, address: Address = None, follow: bool = False, storage: Storage = "runs"
) -> None:
    """Go on with a run from its newest whole checkpoint, here or with --address as a Ray job."""
    client = jobs(address) if address else None
    run, arguments = _stored_config(name, storage, overrides or ())
    if client is None:
        runs.clear_stop(run.run_dir)
        _launch(run)
        return
    from smolray.cluster.jobs import check_submission

    check_submission(run, arguments)
    _submit(client, run, arguments, follow)


@app.command()
def submit(
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file of the run, inside the current folder")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="job server of a cluster, such as http://head:8265")
    ],
    overrides: Overrides = None,
    follow: bool = False,
    keep_alive: Annotated[
        bool, typer.Option("--keep-alive", help="stay, and submit it again when its driver is lost with the head")
    ] = False,
) -> None:
    """Submit jobs/train.py of the current folder to a cluster as a Ray job."""
    run = configs.load_config(config, overrides or ())
    from smolray.cluster.jobs import check_submission

    arguments = ["--config", config, *(overrides or ())]
    check_submission(run, arguments)
    if keep_alive:
        from smolray.cluster import resubmit as watcher

        client = jobs(address)
        runs.clear_stop(run.run_dir)
        for text in watcher.keep_alive(client, run, arguments):
            typer.echo(text, nl=False)
        raise typer.Exit(int(runs.run_status(run.run_dir).state == "failed"))
    _submit(jobs(address), run, arguments, follow)


@config_app.command("show")
def config_show(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """The resolved run as YAML."""
    typer.echo(configs.to_yaml(configs.load_config(config, overrides or ())), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """JSON schema of a run, for editors."""
    import json

    typer.echo(json.dumps(configs.RunConfig.model_json_schema(), indent=1))


def _planned(run: configs.RunConfig, inventory: str | None) -> Any:
    """The plan on described cards, or on those of the cluster."""
    from smolray.planner.inventory import load
    from smolray.planner.plan import make_plan

    if inventory is not None:
        return make_plan(run, _statistics(run), load(inventory))
    from smolray.cluster.connect import connect
    from smolray.launch.driver import look

    statistics = _statistics(run)
    connect()
    return make_plan(run, statistics, look(run).inventory())


def _statistics(run: configs.RunConfig) -> Any:
    """What the planner is told of the data: counted where they are prepared and indexed, else assumed."""
    from smolray.planner.statistics import DataStatistics

    if run.data.train:
        from smolray.data.prepare import shard_folder
        from smolray.data.ray_jobs import load_index
        from smolray.data.shards import ShardError

        try:
            return DataStatistics.from_index(load_index(shard_folder(run, "train"), run))
        except (ShardError, FileNotFoundError):
            errors.print("the data are not prepared and indexed yet: their size is assumed", style="yellow")
    from smolray.planner.shapes import shape_of

    return DataStatistics.default(run, shape_of(run.model))


def _stored_config(
    name: str, storage_uri: str, overrides: list[str] | tuple[()]
) -> tuple[configs.RunConfig, list[str]]:
    """The config that a run was launched with under `overrides`, and the arguments with which jobs/train.py builds the
    same.
    """
    moved = [o for o in overrides if o.partition("=")[0] in ("name", "storage")]
    if moved:
        raise configs.ConfigError(f"{moved[0]}: a run keeps its name and storage; copy its config for a new run")
    path = join(absolute(runs.require_run(storage_uri, name)), "config.yaml")
    # The folder may have been moved, or named by another path, since the config was written into it.
    arguments = [*overrides, f"name={name}", f"storage={absolute(storage_uri)}"]
    return configs.load_config(path, arguments), ["--config", path, *arguments]


def _launch(run: configs.RunConfig) -> None:
    from smolray.cli.tables import accuracy_table
    from smolray.launch.driver import launch_run

    result = launch_run(run)
    console.print(accuracy_table(result))
    console.print(f"{plain(run.run_dir)}: {plain(str(result.get('status', 'finished')))}", soft_wrap=True)


def _submit(client: Any, run: configs.RunConfig, arguments: list[str], follow: bool) -> None:
    from smolray.cluster import jobs as jobs_client

    job_id = jobs_client.submit(client, run, arguments)
    runs.clear_stop(run.run_dir)  # after the cluster took the job: a refused one leaves the request to its run
    console.print(
        f"submitted {job_id}; `smolray status {run.name} --storage {plain(run.storage)}` tells how it goes",
        soft_wrap=True,
    )
    if not follow:
        return
    for text in jobs_client.follow(client, job_id):
        typer.echo(text, nl=False)
    final = client.get_job_status(job_id).value
    console.print(f"{job_id} {final}")
    if final != "SUCCEEDED":
        raise typer.Exit(1)
