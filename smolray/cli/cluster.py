"""Commands for the boxes: examine them, add one, give one back, and a run as manifests for KubeRay."""

from typing import Annotated

import typer

from smolray.cli.options import Overrides, Storage, console, jobs, plain
from smolray.config import load_config
from smolray.storage import absolute

cluster_app = typer.Typer(
    no_args_is_help=True, help="Boxes that join a cluster, and boxes whose owner wants them back."
)
k8s_app = typer.Typer(no_args_is_help=True, help="Runs on Kubernetes with KubeRay.")


def doctor(
    address: Annotated[
        str | None, typer.Option(help="a cluster, such as 192.168.1.10:6379; default: the one of this machine")
    ] = None,
    storage: Annotated[
        str, typer.Option(envvar="SMOLRAY_STORAGE", help="written to, read from and deleted from on every node")
    ] = "",
    path: Annotated[
        list[str] | None, typer.Option(help="a model or data folder that must be the same on every node")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Examine every box of a cluster and each link between them; what is wrong comes with its remedy.

    Exit code 1 if anything fails.
    """
    from smolray.cluster import doctor as doctors

    doctors.connect(address)
    findings = doctors.examine(absolute(storage) if storage else "", path or ())
    if as_json:
        typer.echo(doctors.findings_json(findings))
    else:
        console.print(doctors.findings_table(findings))
    raise typer.Exit(doctors.exit_code(findings))


@cluster_app.command("join")
def cluster_join(
    node: Annotated[str, typer.Argument(help="host name or address of the new box")],
    head: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="address of the head, or its job server")],
    interface: Annotated[str, typer.Option(help="the box's interface to the others, as `ip -br addr` shows it")],
    user: Annotated[str, typer.Option(help="account for ssh")] = "",
    card: Annotated[str, typer.Option(help="label for resources.label_selector, such as rtx-3090")] = "",
    once: Annotated[
        bool, typer.Option("--once", help="a command for the box itself, until it is switched off")
    ] = False,
) -> None:
    """Print the one command that adds a box to a cluster."""
    from smolray.cluster.nodes import join_command

    typer.echo(join_command(node, head, interface, user, card, once))


@cluster_app.command("drain")
def cluster_drain(
    node: Annotated[str, typer.Argument(help="name, address or node id of the box")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="job server of the cluster, such as http://head:8265")
    ],
    wait: Annotated[float, typer.Option(min=1, help="seconds a run may take to save, and to train again")] = 300.0,
    storage: Storage = "runs",
) -> None:
    """Give a box back to its owner: its runs save, leave it and go on without it.

    Run it in the checkout that submitted them.
    """
    from smolray.cluster.nodes import drain

    for line in drain(jobs(address), address, node, absolute(storage), wait):
        console.print(plain(line), soft_wrap=True)


@k8s_app.command("render")
def k8s_render(
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file of the run")],
    overrides: Overrides = None,
    overlay: Annotated[str, typer.Option(help="folder of the cluster's overlay")] = "k8s/overlays/home",
    tune: Annotated[bool, typer.Option("--tune", help="a search: jobs/tune.py instead of jobs/train.py")] = False,
    image: Annotated[str | None, typer.Option(help="default: the overlay's")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="a run a day at this time in cron's format, such as '0 1 * * *'")
    ] = None,
) -> None:
    """The manifests of a run: smolray k8s render --config run.yaml | kubectl replace --force -f -"""
    from smolray.cluster.kubernetes import overlay_objects, render, to_manifests

    run = load_config(config, overrides or ())
    typer.echo(
        to_manifests(render(run, overlay_objects(overlay), "tune" if tune else "train", image, schedule)), nl=False
    )
