"""The ASGI app: which page is where, and who may see it.

In: a Site. Out: the app. Every route but the login and the two static files needs a session with its scope; every POST
carries the token of its session.
"""

import secrets
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from smolray.web import cluster_page, compare_page, data_page, new_page, run_page, runs_page, search_page, try_page
from smolray.web.files import NotFoundError
from smolray.web.guard import Guard
from smolray.web.sessions import COOKIE, Session
from smolray.web.site import Ask, Site, page, static_file

LOGIN_COOKIE = "smolray_login"
FORM_BYTES = 2**20
KINDS = {"web.css": "text/css", "web.js": "text/javascript"}
FOR_EVER = {"cache-control": "public, max-age=31536000, immutable"}

Handler = Callable[[Ask], Response]


class Route(NamedTuple):
    """A page, with the scope that it needs."""

    verb: str
    path: str
    handler: Handler
    scope: str = "view"
    most: int = FORM_BYTES  # of a form


ROUTES = (
    Route("GET", "/", runs_page.show),
    Route("GET", "/live", runs_page.live),
    Route("GET", "/runs/{name}", run_page.show),
    Route("GET", "/runs/{name}/live", run_page.live),
    Route("GET", "/runs/{name}/report", run_page.report),
    Route("GET", "/runs/{name}/image", run_page.image),
    Route("POST", "/runs/{name}/stop", run_page.stop, "operate"),
    Route("POST", "/runs/{name}/resume", run_page.resume, "operate"),
    Route("POST", "/runs/{name}/export", run_page.export, "operate"),
    Route("GET", "/new", new_page.form, "operate"),
    Route("POST", "/new", new_page.check, "operate"),
    Route("GET", "/new/{name}", new_page.show, "operate"),
    Route("GET", "/new/{name}/live", new_page.live, "operate"),
    Route("POST", "/new/{name}/start", new_page.start, "operate"),
    Route("GET", "/compare", compare_page.show),
    Route("GET", "/data", data_page.show),
    Route("GET", "/searches", search_page.show),
    Route("GET", "/searches/{name}", search_page.show_one),
    Route("GET", "/searches/{name}/live", search_page.live),
    Route("GET", "/try", try_page.show, "infer"),
    Route("POST", "/try/ask", try_page.answer, "infer", try_page.IMAGE_BYTES),
    Route("GET", "/cluster", cluster_page.show),
    Route("GET", "/cluster/live", cluster_page.live),
    Route("POST", "/cluster/examine", cluster_page.examine, "operate"),
    Route("POST", "/cluster/drain", cluster_page.drain, "operate"),
)


def make_app(site: Site, hosts: tuple[str, ...] = (), own: bool = True) -> FastAPI:
    """The app. `hosts`: names of this machine that a browser may call it by. `own`: only this machine reaches it."""
    app = FastAPI(title="smolray", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    for route in ROUTES:
        app.add_route(route.path, _let_in(site, route), [route.verb])
    app.add_route("/login", _login(site), ["GET"])
    app.add_route("/login", _log_in(site), ["POST"])
    app.add_route("/logout", _logout(site), ["POST"])
    app.add_route("/static/{name}", _static, ["GET"])
    app.add_middleware(Guard, hosts=hosts, own=own)
    return app


def _let_in(site: Site, route: Route) -> Callable[[Request], Awaitable[Response]]:
    """The handler behind its checks: a session, its scope, and the token of a form."""

    async def handle(request: Request) -> Response:
        cookie = request.cookies.get(COOKIE, "")
        session = site.sessions.find(cookie)
        if session is None:
            if route.verb == "GET" and not route.path.endswith("/live"):
                return RedirectResponse("/login", 303)
            return PlainTextResponse("log in first", 401)
        ask = Ask(site, request, session, cookie)
        if not session.may(route.scope):
            return _fault(ask, 403, f"the key {session.name} has no scope {route.scope}")
        if route.verb == "POST":
            ask.form = await _form(request, route.most)
            if not site.sessions.is_token(cookie, ask.form.get("token", "")):
                return _fault(ask, 403, "this form is too old; go back, load the page again, and send it again")
        return await run_in_threadpool(_answer, route.handler, ask)

    return handle


def _answer(handler: Handler, ask: Ask) -> Response:
    """What the handler answers; an error that is written for people as a page."""
    try:
        return handler(ask)
    except NotFoundError as error:
        return _fault(ask, 404, str(error))
    except (ValueError, OSError) as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("smolray.")):
            raise
        return _fault(ask, 409, str(error))


def _fault(ask: Ask, status: int, message: str) -> HTMLResponse:
    return page(ask, "fault.html", "Not possible", status, message=message)


def _login(site: Site) -> Callable[[Request], Awaitable[Response]]:
    """The page with the field for a key."""

    async def handle(request: Request) -> Response:
        if site.sessions.keys is None:
            return RedirectResponse("/", 303)
        return _login_page(site, request, request.cookies.get(LOGIN_COOKIE, ""), "")

    return handle


def _log_in(site: Site) -> Callable[[Request], Awaitable[Response]]:
    """What the field is sent to."""

    async def handle(request: Request) -> Response:
        before, form = request.cookies.get(LOGIN_COOKIE, ""), await _form(request)
        if not before or not site.sessions.is_token(before, form.get("token", "")):
            return _login_page(site, request, before, "this form is too old; try again")
        cookie = await run_in_threadpool(site.sessions.begin, form.get("key", "").strip())
        if cookie is None:
            fault = "this key is not known, was revoked, or opens no page (`smolray key add NAME --scope view`)"
            return _login_page(site, request, before, fault)
        known = site.sessions.find(cookie)
        response = RedirectResponse("/" if known and known.may("view") else "/try", 303)
        _set_cookie(request, response, COOKIE, cookie)
        response.delete_cookie(LOGIN_COOKIE)
        return response

    return handle


def _login_page(site: Site, request: Request, before: str, fault: str) -> Response:
    cookie = before or secrets.token_urlsafe(32)
    ask = Ask(site, request, Session("", (), site.sessions.token(cookie)))
    response = page(ask, "login.html", "Log in", 403 if fault else 200, fault=fault)
    _set_cookie(request, response, LOGIN_COOKIE, cookie)
    return response


def _logout(site: Site) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        cookie = request.cookies.get(COOKIE, "")
        form = await _form(request)
        if not site.sessions.is_token(cookie, form.get("token", "")):
            return PlainTextResponse("this form is too old", 403)
        site.sessions.end(cookie)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response

    return handle


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in KINDS:
        return PlainTextResponse("not found", 404)
    return Response(static_file(name), media_type=KINDS[name], headers=FOR_EVER)


async def _form(request: Request, most: int = FORM_BYTES) -> dict[str, str]:
    """The fields of a form; of one that is too large or no form, none."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            return {}
    text = content.decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=1000))


def _set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    response.set_cookie(name, value, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
