"""The command `smolray k8s render`: a run as manifests for Kubernetes with KubeRay."""

from typing import Annotated

import typer

from smolray.cli.options import Overrides
from smolray.config import load_config

k8s_app = typer.Typer(no_args_is_help=True, help="Runs on Kubernetes with KubeRay.")


@k8s_app.command("render")
def render(
    config: Annotated[
        str, typer.Option("--config", "-c", help="YAML file of the run, or a recipe of `smolray config list`")
    ],
    overrides: Overrides = None,
    overlay: Annotated[
        str, typer.Option(help="one of smolray's (home, pool, cpu, autoscale, kueue), or a folder")
    ] = "home",
    tune: Annotated[bool, typer.Option("--tune", help="a search: `smolray tune` in place of `smolray train`")] = False,
    image: Annotated[str | None, typer.Option(help="default: the overlay's")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="a run a day at this time in cron's format, such as '0 1 * * *'")
    ] = None,
) -> None:
    """Print the manifests of a run.

    Example: smolray k8s render --config run.yaml | kubectl apply -f -
    """
    from smolray.cluster import kubernetes

    run = load_config(config, overrides or ())
    objects = kubernetes.overlay_objects(overlay)
    typer.echo(
        kubernetes.to_manifests(kubernetes.render(run, objects, "tune" if tune else "train", image, schedule)), nl=False
    )
