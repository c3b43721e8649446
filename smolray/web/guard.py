"""What every request and every answer must be, whatever page it is for.

In: an ASGI app. Out: the same app, for requests of our own pages alone: a known Host (no name of another site that
resolves to this machine), the own Origin of whatever changes something, and a policy that runs no script but ours.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

READS = {"GET": True, "HEAD": True}  # what changes nothing
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # with no-referrer a browser would not name the Origin of our own forms
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """`hosts`: names by which the pages may be called. `own`: they are reached from this machine alone."""

    def __init__(self, app: Any, hosts: Collection[str] = (), own: bool = True):
        self.app, self.own = app, own
        self.hosts = {host.lower() for host in hosts} | {"localhost"}
        if not own:
            self.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        if fault := self._fault(scope):
            await _refuse(guarded, fault)
            return
        await self.app(scope, receive, guarded)

    def _fault(self, scope: Scope) -> str:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_known(host):
            return f"the host {host[:100]!r} is not known here; expected an address, or a name given by --allow-host"
        if READS.get(scope["method"]):
            return ""
        origin = headers.get("origin", "")
        if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return f"the origin {origin[:100]!r} is another site; expected {host}"
        return ""

    def _is_known(self, host: str) -> bool:
        name = host.lower()
        name = name[: name.rfind(":")] if name.rpartition(":")[2].isdigit() and not name.endswith("]") else name
        if name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or not self.own


async def _refuse(send: Send, fault: str) -> None:
    await send(
        {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain; charset=utf-8")]}
    )
    await send({"type": "http.response.body", "body": fault.encode()})
