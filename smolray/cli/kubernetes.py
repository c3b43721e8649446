"""The command `smolray k8s render`: a run as manifests for Kubernetes with KubeRay."""

from typing import Annotated

import typer

from smolray.cli.options import Overrides
from smolray.config import ConfigError, load_config

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
    serve: Annotated[bool, typer.Option("--serve", help="a service that answers with the trained run")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="a search: `smolray tune` in place of `smolray train`")] = False,
    image: Annotated[str | None, typer.Option(help="default: the overlay's")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="a run a day at this time in cron's format, such as '0 1 * * *'")
    ] = None,
) -> None:
    """Print the manifests of a run.

    Example: smolray k8s render --config run.yaml | kubectl apply -f -
    """
    from smolray.cluster import kubernetes, kubernetes_service

    run = load_config(config, overrides or ())
    if serve and (tune or schedule):
        raise ConfigError("--serve is neither a search nor on a schedule; leave out --tune and --schedule")
    objects = kubernetes.overlay_objects(overlay)
    if serve:
        rendered = kubernetes_service.render_service(run, objects, image)
    else:
        rendered = kubernetes.render(run, objects, "tune" if tune else "train", image, schedule)
    typer.echo(kubernetes.to_manifests(rendered), nl=False)
