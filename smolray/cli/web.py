"""The command `smolray web`: the runs of a storage in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from smolray.cli.access import KeyFile, check_access, key_path, require_web_packages
from smolray.cli.options import Storage, errors, plain


def web(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8080,
    key_file: KeyFile = "",
    no_key: Annotated[bool, typer.Option("--no-key", help="ask for no key; on this machine's loopback only")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="a name by which a browser calls these pages; default: localhost")
    ] = None,
    address: Annotated[
        str, typer.Option(help="job server that starts runs, such as http://head:8265; default: this machine")
    ] = "",
    endpoint: Annotated[
        str, typer.Option(help="a server of OpenAI's API to try models, such as http://127.0.0.1:8000/v1")
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="for --endpoint")] = "",
    export: Annotated[
        str,
        typer.Option(help="write the pages as files into this folder or bucket instead, to be read without a server"),
    ] = "",
    storage: Storage = "runs",
) -> None:
    """Show, compare, start and stop runs in a browser.

    Example: smolray key add me --scope operate; smolray web
    """
    if export:
        _export(storage, export)
        return

    keys = "" if no_key else str(key_path(key_file))
    own = check_access(host, port, keys, "view")
    require_web_packages("web")

    import uvicorn

    from smolray.serve.keys import KeyRing
    from smolray.storage import absolute
    from smolray.tune.report import read_report, searches_in
    from smolray.web.app import make_app
    from smolray.web.processes import Processes
    from smolray.web.run_list import RunList
    from smolray.web.sessions import Sessions
    from smolray.web.site import Endpoint, Searches, Site

    site = Site(
        absolute(storage),
        Sessions(KeyRing(Path(keys)) if keys else None, ("view", "infer") if endpoint else ("view",)),
        Processes(Path(absolute("~/.smolray/web"))),
        RunList(storage),
        Searches(searches_in, read_report),
        address,
        Endpoint(endpoint.rstrip("/"), api_key) if endpoint else None,
    )
    app = make_app(site, tuple(allow_host or ()), own)
    shown = f"[{host}]" if ":" in host else host
    errors.print(f"runs of {plain(site.root)} at http://{shown}:{port}", soft_wrap=True)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False)
    config.timeout_graceful_shutdown = 1  # an open page would be waited for
    uvicorn.Server(config).run()


def _export(root: str, target: str) -> None:
    require_web_packages("web")

    from smolray.storage import absolute, join
    from smolray.web.exported import export_pages
    from smolray.web.run_list import RunList

    target = absolute(target)
    written = export_pages(RunList(root), target)
    errors.print(f"{written} runs of {plain(absolute(root))} at {plain(join(target, 'index.html'))}", soft_wrap=True)
