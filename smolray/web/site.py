"""What all pages share: the storage, who is logged in, what was started, and how a page is written.

In: a request that was let in. Out: HTML.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from smolray.report.page import render
from smolray.web.drafts import Drafts
from smolray.web.processes import Processes
from smolray.web.run_list import RunList
from smolray.web.run_view import RunViews
from smolray.web.sessions import Session, Sessions

PACKAGE = "smolray.web"
PAGES = {
    "Runs": ("/", "view"),
    "New run": ("/new", "operate"),
    "Compare": ("/compare", "view"),
    "Search": ("/searches", "view"),
    "Data": ("/data", "view"),
    "Cluster": ("/cluster", "view"),
    "Try": ("/try", "infer"),
}  # in the head of each page, with the scope


class Searches(NamedTuple):
    """How searches are found under a storage folder, and the report of one as markup."""

    names: Callable[[str], list[str]]
    report: Callable[[str], Markup]


class Endpoint(NamedTuple):
    """A server of OpenAI's API: its address up to /v1, and a key for it, empty for none."""

    url: str
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What each request to it carries."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass
class Site:
    """One storage folder of runs and its pages. `address`: the job server that starts runs; empty: this machine."""

    root: str
    sessions: Sessions
    processes: Processes
    runs: RunList
    searches: Searches
    address: str = ""
    endpoint: Endpoint | None = None  # for the page Try
    drafts: Drafts = field(default_factory=Drafts)
    views: RunViews = field(default_factory=RunViews)
    streams: int = 0  # pages that are open and follow what happens


@dataclass
class Ask:
    """A request that was let in. `form`: the fields of a POST."""

    site: Site
    request: Request
    session: Session
    cookie: str = ""
    form: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run that the path names."""
        return str(self.request.path_params["name"])

    def given(self, key: str, default: str = "") -> str:
        """A word behind the `?` of the address."""
        return self.request.query_params.get(key, default)


class Addresses:
    """Where what a page leads to is, as that page writes it."""

    def run(self, name: str) -> str:
        """The page of a run."""
        return run_path(name)

    def report(self, name: str) -> str:
        """The report of a run."""
        return run_path(name, "report")

    def image(self, name: str, key: str) -> str:
        """A validation image of a run."""
        return f"{run_path(name, 'image')}?key={quote(key, safe='')}"


def page(ask: Ask, template: str, title: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A whole page."""
    shown = {name: path for name, (path, scope) in PAGES.items() if ask.session.may(scope)}
    if ask.site.endpoint is None:
        shown.pop("Try", None)
    written = render(
        template,
        PACKAGE,
        title=title,
        pages=shown,
        here=ask.request.url.path,
        session=ask.session,
        asks_for_keys=ask.site.sessions.keys is not None,
        live=True,
        home="/",
        style=f"/static/web.css?{static_version()}",
        script=f"/static/web.js?{static_version()}",
        **values,
    )
    return HTMLResponse(written, status)


def fragment(template: str, **values: Any) -> str:
    """A part of a page."""
    return str(render(template, PACKAGE, **values))


def run_path(name: str, *parts: str) -> str:
    """The address of a run's page, or of something below it."""
    return "/".join(["/runs", quote(name, safe=""), *parts])


@lru_cache
def static_file(name: str) -> bytes:
    """The style sheet (that of the reports, and our own) or the script."""
    own = resources.files(PACKAGE).joinpath("static", name).read_bytes()
    if name != "web.css":
        return own
    return resources.files("smolray.report").joinpath("templates", "page.css").read_bytes() + own


@lru_cache
def static_version() -> str:
    """Changes with the files, so that browsers may keep them."""
    return hashlib.sha256(b"".join(static_file(name) for name in ("web.css", "web.js"))).hexdigest()[:12]
