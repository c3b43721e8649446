"""Images at http(s) URLs, fetched only where `data.fetch_urls` says so.

In: a URL. Out: its bytes, or a SampleError. Nothing inside a private network is reached: the name of the host is looked
up once, only a public address is connected to, and each redirect is checked in the same way.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from smolray.data.sample import SampleError

MAX_BYTES = 32 * 2**20
CONNECT_SECONDS, TOTAL_SECONDS = 10, 60
REDIRECTS = 4
_NAT64 = ipaddress.ip_network("64:ff9b::/32")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour or ip.teredo or ip in _NAT64:  # these carry an IPv4 address of any kind
            return False
    return ip.is_global and not ip.is_multicast


def fetch(url: str, is_allowed: Callable[[str], bool] = is_public, hosts: Collection[str] | None = None) -> bytes:
    """The content at a URL.

    `is_allowed`: which addresses may be connected to; `hosts`: the names it may be fetched from, also by a redirect,
    None for any. Raises SampleError (missing_file).
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise OSError(f"it leads to {parts.scheme}://, which is not fetched")
            if hosts is not None and parts.hostname not in hosts:
                raise OSError(f"{parts.hostname} is not among the hosts that images are fetched from")
            content, redirect = _get(parts, is_allowed, deadline)
            if not redirect:
                return content
            url = urljoin(url, redirect)
        raise OSError(f"more than {REDIRECTS} redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:
        shown = url.partition("?")[0][:200]
        raise SampleError("missing_file", f"image {shown} cannot be fetched: {str(error)[:200]}") from error


def _get(url: SplitResult, is_allowed: Callable[[str], bool], deadline: float) -> tuple[bytes, str]:
    """(content, "") or (b"", where it redirects to)."""
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
    connection.sock = _connected(host, port, is_allowed)
    try:
        if url.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("GET", path, headers={"User-Agent": "smolray", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return b"", response.headers.get("Location", "")
        if response.status != 200:
            raise OSError(f"the server answers {response.status} {response.reason}")
        return _body(response, deadline), ""
    finally:
        connection.close()


def _connected(host: str, port: int, is_allowed: Callable[[str], bool]) -> socket.socket:
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    refused = [address for address in addresses if not is_allowed(address.partition("%")[0])]
    if refused:
        raise OSError(f"{host} is {refused[0]}, which is not a public address")
    return socket.create_connection((addresses[0], port), CONNECT_SECONDS)


def _body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    found = bytearray()
    while chunk := response.read(2**16):
        found += chunk
        if len(found) > MAX_BYTES:
            raise OSError(f"it has more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise OSError(f"it takes longer than {TOTAL_SECONDS} s")
    return bytes(found)
