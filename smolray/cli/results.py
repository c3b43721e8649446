"""Commands for what a run has produced: `smolray evaluate`, `compare`, `report`, `track` and `export`."""

import os
from typing import Annotated

import typer

from smolray.cli.options import Checkpoint, Name, Storage, console, plain, stored_config
from smolray.config import ConfigError
from smolray.run.status import require_run

HISTORY_SECONDS = 3600.0  # a tracker has for the history of a long run


def evaluate(
    name: Name,
    checkpoint: Checkpoint = None,
    endpoint: Annotated[
        str, typer.Option(help="ask a server of OpenAI's API instead, such as http://127.0.0.1:8000/v1")
    ] = "",
    model: Annotated[str, typer.Option(help="as the server names it; default: the run's name")] = "",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="for the server")] = "",
    storage: Storage = "runs",
) -> None:
    """Answer the validation questions with a trained run; print its accuracy."""
    run, _ = stored_config(name, storage)

    from smolray.cli.tables import accuracy_table, metrics_table
    from smolray.evaluate.validation import evaluation_fields

    if endpoint:
        from smolray.evaluate.endpoint import Endpoint, evaluate_endpoint

        if checkpoint:
            raise ConfigError("--checkpoint says nothing to --endpoint: the server has loaded a model already")
        result = evaluation_fields(evaluate_endpoint(run, Endpoint(endpoint, model or name, api_key)))
    else:
        from smolray.launch.driver import evaluate_run

        result = evaluate_run(run, checkpoint)
    console.print(accuracy_table(result))
    console.print(metrics_table(result.get("metrics") or {}))


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
    """Compare two evaluations question by question.

    Examples: smolray compare RUN --a 500 --b 1000, or smolray compare RUN OTHER
    """
    first = require_run(storage, name)
    second = require_run(storage, other) if other else first

    from smolray.cli.tables import changes_table, comparison_table
    from smolray.evaluate.compare import compare_runs

    found = compare_runs(first, second, a, b, metric)
    console.print(comparison_table(found))
    console.print(changes_table(found, limit))
    if found.only_a or found.only_b:
        console.print(f"left out: {found.only_a:,} questions that only a has, {found.only_b:,} that only b has")


def report(name: Name, storage: Storage = "runs") -> None:
    """Write the HTML report of a run again."""
    run_dir = require_run(storage, name)

    from smolray.report.run import write_report

    console.print(plain(write_report(run_dir)), soft_wrap=True)


def checkpoints(
    name: Name,
    verify: Annotated[bool, typer.Option("--verify", help="read them whole, and compare their hashes")] = False,
    storage: Storage = "runs",
) -> None:
    """List the checkpoints of a run, also while it trains.

    Each can be exported meanwhile: smolray export RUN --checkpoint step-00000500 --adapter --out FOLDER
    """
    run_dir = require_run(storage, name)

    from smolray.cli.tables import checkpoints_table
    from smolray.run import checkpoint

    found = checkpoint.look(run_dir, verify)
    best, whole = checkpoint.best(run_dir), [one for one in found.values() if isinstance(one, checkpoint.Checkpoint)]
    console.print(checkpoints_table(found, best.step if best else None) if found else f"{name} has no checkpoint yet")
    if whole:
        console.print(
            f"as a model: smolray export {name} --checkpoint step-{whole[-1].step:08d} --out FOLDER", style="dim"
        )
        console.print("its adapters alone, for PEFT: with --adapter", style="dim")


def track(
    name: Name,
    trackers: Annotated[
        list[str], typer.Argument(metavar="TRACKER…", help="tensorboard, wandb, mlflow, trackio or swanlab")
    ],
    storage: Storage = "runs",
) -> None:
    """Send the history of a run to trackers; what they have is left out.

    Example: TENSORBOARD_LOGGING_DIR=board smolray track RUN tensorboard
    """
    run, _ = stored_config(name, storage)

    from smolray.report.run import read_images
    from smolray.run.events import read_events
    from smolray.run.result import reading
    from smolray.tracking.feed import fed
    from smolray.tracking.points import point_of
    from smolray.tracking.registry import require_trackers, tracker_consumers

    require_trackers(trackers, run.run_dir)
    with reading(run.run_dir):
        points = [point for event in read_events(run.run_dir) if (point := point_of(event))]
    console.print(f"{len(points):,} points of {name}")
    consumers = list(tracker_consumers(run, trackers, lambda: read_images(run.run_dir)))
    with fed(run.run_dir, consumers, _say, HISTORY_SECONDS) as feeds:
        pass
    if not all(feed.complete for feed in feeds):
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(plain(line), soft_wrap=True)


def export(
    name: Name,
    out: Annotated[str | None, typer.Option(help="default: <run>/export, with --adapter <run>/adapter")] = None,
    checkpoint: Checkpoint = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the adapters alone, for PEFT")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="also to this repository of the hub, with the token in HF_TOKEN")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="of the repository; default: main")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    license: Annotated[str, typer.Option(help="for the model card, such as apache-2.0")] = "",
    language: Annotated[str, typer.Option(help="for the model card, such as en")] = "",
    storage: Storage = "runs",
) -> None:
    """Write the trained model as a folder that transformers or PEFT loads."""
    run_dir = require_run(storage, name)

    token = os.environ.get("HF_TOKEN", "")
    if push_to_hub and not token:
        raise ConfigError(f"--push-to-hub {push_to_hub} needs a token that may write there; set HF_TOKEN")

    from smolray.export import export_adapter, export_run
    from smolray.hub import push_folder
    from smolray.model_card import CardDetails

    write = export_adapter if adapter else export_run
    target = write(run_dir, out, checkpoint, CardDetails(license, language, repo=push_to_hub or ""))
    console.print(plain(target), soft_wrap=True)
    if push_to_hub:
        url = push_folder(target, push_to_hub, private, token, os.environ.get("HF_ENDPOINT"), revision)
        console.print(plain(url), soft_wrap=True)
