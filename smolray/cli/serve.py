"""The commands `smolray serve`, and `smolray key add`, `list` and `revoke`: models behind OpenAI's HTTP API."""

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from smolray.cli.access import KeyFile, check_access, key_path, require_web_packages
from smolray.cli.options import Storage, console, errors, plain
from smolray.config import ConfigError

if TYPE_CHECKING:
    from smolray.serve.settings import ServeSettings

key_app = typer.Typer(no_args_is_help=True, help="Keys for `smolray serve` and `smolray web`.")

KeyName = Annotated[str, typer.Argument(help="whose key it is, such as laptop")]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL…",
        help="runs (RUN@step-00000500: a checkpoint of one; else its best), or folders or hub ids that "
        "transformers loads; then KEY=VALUE settings",
    ),
]
Backend = Annotated[
    Literal["smolray", "vllm"],
    typer.Option(help="what answers: smolray's engine, or vLLM, from an environment that has smolray[vllm]"),
]


def serve(
    models: Models,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    key_file: KeyFile = "",
    no_key: Annotated[
        bool, typer.Option("--no-key", help="ask for no API key; on this machine's loopback only")
    ] = False,
    backend: Backend = "smolray",
    replicas: Annotated[
        str, typer.Option(help="copies of each model or shared base, one a GPU: a number, or LOW:HIGH by the load")
    ] = "1",
    slots: Annotated[int, typer.Option(min=1, help="answers that a replica decodes at a time")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="more that may wait; beyond, a request is told to come back")] = 64,
    kv_gib: Annotated[
        float | None, typer.Option(help="memory for keys and values; default: most of a GPU, 1 without a GPU")
    ] = None,
    request_mib: Annotated[int, typer.Option(min=1, help="largest request")] = 32,
    images: Annotated[int, typer.Option(min=0, help="most images of a request")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="longest time for a request")] = 300.0,
    images_from: Annotated[
        list[str] | None, typer.Option(help="a public host that http(s) images are fetched from; default: none")
    ] = None,
    storage: Storage = "runs",
) -> None:
    """Answer OpenAI's HTTP API with trained models.

    Example: smolray key add laptop; smolray serve RUN
    """
    if backend == "vllm" and not no_key:
        raise ConfigError("--backend vllm asks for no API key: add --no-key, which serves this machine alone")
    keys = "" if no_key else str(key_path(key_file))
    check_access(host, port, keys, "infer")
    require_web_packages("serve")

    from smolray.serve.settings import ServeSettings

    settings = ServeSettings(
        models=[name for name in models if "=" not in name],
        overrides=[setting for setting in models if "=" in setting],
        backend=backend,
        storage=storage,
        key_file=keys,
        replicas=_replicas(replicas),
        slots=slots,
        queue=queue,
        kv_gib=kv_gib,
        request_mib=request_mib,
        images=images,
        seconds=seconds,
        image_hosts=images_from or [],
    )
    _serve(settings, host, port)


def _serve(settings: "ServeSettings", host: str, port: int) -> None:
    """Start the service and hold it until it is stopped. Raises ConfigError where Ray dies."""
    from smolray.cluster.connect import connect
    from smolray.cluster.local_ray import LOCAL_RAY
    from smolray.cluster.signals import Stopped
    from smolray.serve import deployment
    from smolray.serve.vllm import app_arguments, require_vllm

    sources = deployment.find_sources(settings)  # what is wrong with them is reported before Ray starts
    if settings.backend == "vllm":
        require_vllm()
        app_arguments(settings, sources, gpu=False)
    connect()
    deployment.start(settings, host, port)
    shown = f"[{host}]" if ":" in host else host
    errors.print(f"serving {plain(', '.join(settings.models))} at http://{shown}:{port}/v1", soft_wrap=True)
    try:
        while not LOCAL_RAY.died:
            time.sleep(1)
    except Stopped:
        deployment.stop()
        raise
    raise ConfigError(f"Ray has died ({', '.join(LOCAL_RAY.died)}); start the service again")


@key_app.command("add")
def add(
    name: KeyName,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="what for, may be given several times: infer (`smolray serve`, the default), view (the pages of "
            "`smolray web`), operate (view, and start, stop and export runs there)",
        ),
    ] = None,
    key_file: KeyFile = "",
) -> None:
    """Make a key and print it: it is shown this once, and only its hash is kept."""
    from smolray.serve.keys import INFER, add_key

    typer.echo(add_key(key_path(key_file), name, scope or INFER))


@key_app.command("list")
def list_keys(key_file: KeyFile = "") -> None:
    """Show the names of the keys, what they are for, and when they were made."""
    from smolray.serve.keys import read_keys

    for key in read_keys(key_path(key_file)):
        made = datetime.fromtimestamp(key.made).isoformat(" ", "minutes")
        console.print(f"{plain(key.name)}  {' '.join(key.scopes)}  [dim]{made}[/dim]", soft_wrap=True)


@key_app.command("revoke")
def revoke(name: KeyName, key_file: KeyFile = "") -> None:
    """Remove a key; a running service and its open pages refuse it from now on."""
    from smolray.serve.keys import revoke_key

    revoke_key(key_path(key_file), name)


def _replicas(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--replicas {text}: expected a number of at least 1, or LOW:HIGH such as 1:4")
    return found
