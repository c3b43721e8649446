"""Commands for the nodes of a cluster: `smolray doctor`, `smolray cluster join` and `smolray cluster drain`."""

from typing import Annotated

import typer

from smolray.cli.options import Storage, console, job_client, plain
from smolray.storage import absolute

cluster_app = typer.Typer(no_args_is_help=True, help="Add a node to a cluster, or give one back to its owner.")


def doctor(
    address: Annotated[
        str | None, typer.Option(help="a cluster, such as 192.168.1.10:6379; default: the one of this machine")
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            envvar="SMOLRAY_STORAGE", help="storage to test: every node writes, reads and deletes a small file there"
        ),
    ] = "",
    path: Annotated[
        list[str] | None, typer.Option(help="a model or data folder that must be the same on every node")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False,
) -> None:
    """Check the nodes of a cluster and the links between them.

    Each fault comes with its remedy. Exit code 1 where anything fails.
    """
    from smolray.cluster.doctor import examine, join_running
    from smolray.cluster.findings import exit_code, findings_json, findings_table

    join_running(address)
    findings = examine(absolute(storage) if storage else "", path or ())
    if as_json:
        typer.echo(findings_json(findings))
    else:
        console.print(findings_table(findings))
    raise typer.Exit(exit_code(findings))


@cluster_app.command("join")
def join(
    node: Annotated[str, typer.Argument(help="host name or address of the new node")],
    head: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="address of the head, or its job server")],
    interface: Annotated[
        str, typer.Option(help="the node's network interface to the others, as `ip -br addr` shows it")
    ],
    user: Annotated[str, typer.Option(help="account for ssh")] = "",
    gpu: Annotated[str, typer.Option(help="label for resources.label_selector, such as rtx-3090")] = "",
    once: Annotated[
        bool,
        typer.Option("--once", help="print a command to run on the node itself; it stays until it is switched off"),
    ] = False,
) -> None:
    """Print the one command that adds a node to a cluster."""
    from smolray.cluster.nodes import join_command

    typer.echo(join_command(node, head, interface, user, gpu, once))


@cluster_app.command("drain")
def drain(
    node: Annotated[str, typer.Argument(help="name, address or node id of the node")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="job server of the cluster, such as http://head:8265")
    ],
    wait: Annotated[float, typer.Option(min=1, help="seconds a run may take to save, and to train again")] = 300.0,
    storage: Storage = "runs",
) -> None:
    """Give a node back to its owner; its runs continue on the others.

    The runs save, leave the node and are submitted again. Where they were submitted from a checkout, run this there:
    its code is uploaded again.
    """
    from smolray.cluster import nodes

    for line in nodes.drain(job_client(address), address, node, absolute(storage), wait):
        console.print(plain(line), soft_wrap=True)
