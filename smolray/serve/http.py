"""OpenAI's API over HTTP, as a FastAPI app.

In: models by name, the keys, and limits. Out: an ASGI app. A request is refused before its body is read where its key
is wrong or too much is going on; a client that hangs up ends its request at once.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from smolray.data.sample import Sample
from smolray.serve.answer import Asked, Piece
from smolray.serve.chat import ChatStream, completion, how_asked
from smolray.serve.embeddings import embedding_list, embedding_samples
from smolray.serve.errors import ApiError
from smolray.serve.images import image_checks, read_image
from smolray.serve.keys import KeyRing
from smolray.serve.metrics import Metrics
from smolray.serve.model import Embedded
from smolray.serve.schema import ChatRequest, EmbeddingRequest, parse

T = TypeVar("T")
LOOK_SECONDS = 0.2  # between two looks whether the client is still there
IMAGE_THREADS = 2  # images that are decoded at a time, to check them


class Backend(Protocol):
    """A model somewhere: see model.ServedModel."""

    def chat(self, sample: Sample, asked: Asked, max_new_tokens: int | None, stream: bool) -> AsyncIterator[Piece]: ...

    async def embed(self, samples: Sequence[Sample]) -> Embedded: ...

    async def states(self) -> list[dict[str, int]]: ...


@dataclass(frozen=True)
class HttpLimits:
    """What one request may be, and how many there may be.

    Attributes:
        request_bytes: size of a body.
        images: images of a request.
        seconds: from the request to its end.
        open_requests: requests that are not finished.
        image_hosts: hosts that http(s) images are fetched from.
    """

    request_bytes: int = 32 * 2**20
    images: int = 16
    seconds: float = 300.0
    open_requests: int = 256
    image_hosts: Collection[str] = ()


@dataclass(frozen=True)
class Offered:
    """A model that is offered. `image_prompt`: the text with each image that is embedded."""

    backend: Backend
    max_image_pixels: int
    image_prompt: str = ""
    since: int = field(default_factory=lambda: int(time.time()))


class Service:
    """The state of the app: who is let in, and what is going on."""

    def __init__(self, models: Mapping[str, Offered], keys: KeyRing | None, limits: HttpLimits):
        self.models, self.keys, self.limits = models, keys, limits
        self.metrics = Metrics()
        self.images = ThreadPoolExecutor(IMAGE_THREADS, "images")
        self.checks = {name: image_checks(model.max_image_pixels) for name, model in models.items()}
        self.open = 0

    def check_key(self, request: Request) -> None:
        """Raise ApiError (401, 403) unless the request has a key with the scope infer, or none is needed."""
        if self.keys is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not key:
            raise ApiError(401, "no API key; expected the header `Authorization: Bearer KEY`", "missing_api_key")
        known = self.keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if known is None:
            raise ApiError(401, "this API key is not known, or was revoked", "invalid_api_key")
        if not known.may("infer"):
            scopes = ", ".join(known.scopes)
            raise ApiError(403, f"this key may not ask models (scopes: {scopes}); expected infer", "wrong_scope")

    def model(self, name: str) -> Offered:
        """Raises ApiError (404)."""
        if name not in self.models:
            there = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name[:100]!r} here; there: {there}", "model_not_found", "model")
        return self.models[name]

    async def body(self, request: Request) -> Any:
        """The JSON of a request. Raises ApiError: too large (413), no JSON (400, 415)."""
        most = self.limits.request_bytes
        if "json" not in request.headers.get("content-type", ""):
            raise ApiError(415, "expected Content-Type: application/json")
        said = request.headers.get("content-length", "0")
        content = bytearray()
        if not said.isdigit() or int(said) <= most:
            async for part in request.stream():
                content += part
                if len(content) > most:
                    break
            else:
                return _json(bytes(content))
        raise ApiError(413, f"the request has more than {most} bytes; send fewer or smaller images", "too_large")

    async def read_images(self, urls: Sequence[str], model: str) -> tuple[bytes, ...]:
        """The images at `urls`, for a model. Raises ApiError."""
        if len(urls) > self.limits.images:
            raise ApiError(
                400, f"{len(urls)} images; at most {self.limits.images} in a request", "too_many_images", "messages"
            )
        loop, checks, hosts = asyncio.get_running_loop(), self.checks[model], self.limits.image_hosts
        read = (loop.run_in_executor(self.images, read_image, url, checks, hosts) for url in urls)
        return tuple(await asyncio.gather(*read))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        began = time.monotonic()
        body = await self.body(request)
        asked = parse(ChatRequest, body)
        model = self.model(asked.model)
        request.state.model = asked.model
        conversation = asked.conversation()
        images = await self.read_images(asked.image_urls, asked.model)
        how = how_asked(asked, conversation, images)
        limit = asked.max_completion_tokens or asked.max_tokens
        pieces = self._in_time(model.backend.chat(Sample(images, conversation), how, limit, asked.stream), began)
        try:
            first = await _unless_gone(request, anext(pieces))  # what is refused is refused with its status
        except BaseException:
            await pieces.aclose()
            raise
        self.metrics.first_seconds.labels(asked.model).observe(time.monotonic() - began)
        if asked.stream:
            return ChatStream(asked, first, pieces)
        await pieces.aclose()
        return JSONResponse(completion(asked.model, first))

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        asked = parse(EmbeddingRequest, await self.body(request))
        model = self.model(asked.model)
        request.state.model = asked.model
        urls = [one.image_url.url for one in asked.inputs if not isinstance(one, str)]
        images = await self.read_images(urls, asked.model)
        samples = embedding_samples(asked, images, model.image_prompt)
        try:
            async with asyncio.timeout(self.limits.seconds):
                embedded = await _unless_gone(request, model.backend.embed(samples))
        except TimeoutError:
            raise self._late() from None
        return JSONResponse(embedding_list(asked, embedded))

    async def _in_time(self, pieces: AsyncIterator[Piece], began: float) -> AsyncGenerator[Piece]:
        """The pieces, while they come in time. Raises ApiError (504)."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds - (time.monotonic() - began)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces)
                yield piece
                if piece.finish:
                    return
        except TimeoutError:
            raise self._late() from None
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # also ends a call that is under way

    def _late(self) -> ApiError:
        return ApiError(504, f"not answered within {self.limits.seconds:.0f} s; ask for less", "timeout")


def make_app(models: Mapping[str, Offered], keys: KeyRing | None, limits: HttpLimits) -> FastAPI:
    """The app. Without `keys` everyone who reaches it may use it."""
    service = Service(models, keys, limits)
    app = FastAPI(title="smolray", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        service.check_key(request)
        names: dict[Backend, list[str]] = {}  # runs that share a base share what is counted
        for name, model in models.items():
            names.setdefault(model.backend, []).append(name)
        states = {",".join(found): await backend.states() for backend, found in names.items()}
        return PlainTextResponse(service.metrics.text(states))

    async def list_models(request: Request) -> Response:
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [_card(name, model) for name, model in models.items()]})

    async def one_model(request: Request) -> Response:
        service.check_key(request)
        name = request.path_params["name"]
        return JSONResponse(_card(name, service.model(name)))

    for path, handler in (
        ("/health", health),
        ("/metrics", metrics),
        ("/v1/models", list_models),
        ("/v1/models/{name:path}", one_model),
    ):
        app.add_route(path, handler, ["GET"])
    app.add_route("/v1/chat/completions", _counted(service, service.chat), ["POST"])
    app.add_route("/v1/embeddings", _counted(service, service.embed), ["POST"])

    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    return app


def _counted(
    service: Service, handle: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """The handler with its key checked, its place among the open requests, and its numbers."""

    async def counted(request: Request) -> Response:
        service.check_key(request)
        if service.open >= service.limits.open_requests:
            raise ApiError(429, f"{service.open} requests are open; try again soon", "too_many", retry_after=1)
        path, began = request.url.path, time.monotonic()
        request.state.model = ""
        status = 499  # the client has left
        service.open += 1
        service.metrics.open.set(service.open)

        def end() -> None:
            service.open -= 1
            service.metrics.open.set(service.open)
            service.metrics.requests.labels(request.state.model, path, str(status)).inc()
            service.metrics.seconds.labels(request.state.model, path).observe(time.monotonic() - began)

        streams = False
        try:
            response = await handle(request)
            status = response.status_code
            if isinstance(response, ChatStream):
                response.at_end, streams = end, True
            return response
        except _GoneError:
            return Response(status_code=status)
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            if not streams:
                end()

    return counted


class _GoneError(Exception):
    """The client has hung up."""


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives. Where the client hangs up before, the work is cancelled. Raises _GoneError."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise _GoneError
        return task.result()
    finally:
        task.cancel()
        with suppress(BaseException):
            await task


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None


def _card(name: str, model: Offered) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": model.since, "owned_by": "smolray"}


async def _refused(_: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{error.detail}: the API is /v1/models, /v1/chat/completions, …")
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)
