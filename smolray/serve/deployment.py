"""The service on Ray Serve: a deployment for each base model, one replica on each GPU, and one that answers HTTP.

In: ServeSettings. Out: a Ray Serve application. `application` is what a Ray Serve configuration imports.
"""

import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from smolray import storage
from smolray.config import ConfigError
from smolray.data.formats.layouts import CAPTION_PROMPT
from smolray.data.sample import Sample
from smolray.inference.predictor import ModelSource, find_model
from smolray.inference.shared import groups
from smolray.serve.answer import Asked, Piece
from smolray.serve.engine import EngineLimits
from smolray.serve.errors import ApiError
from smolray.serve.http import HttpLimits, Offered, make_app
from smolray.serve.keys import KeyRing
from smolray.serve.model import Embedded, ServedModel
from smolray.serve.settings import ServeSettings
from smolray.serve.vllm import app_arguments


class ServeError(RuntimeError):
    """The service does not start; the message says why."""


NAME = "smolray"  # of the application on Ray Serve
STATE_SECONDS = 5.0  # for a replica to say what it holds
CHECKPOINT = re.compile(r"(.+)@(step-\d+|latest)")  # of a run, in the name of a model
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


class ModelReplica:
    """A model, or several runs on one base, in an actor of its own. See ServedModel."""

    def __init__(self, sources: Mapping[str, ModelSource], limits: EngineLimits, gpu: bool):
        self.model = ServedModel(sources, limits, torch.device("cuda" if gpu else "cpu"))

    async def chat(
        self, sample: Sample, asked: Asked, max_new_tokens: int | None, stream: bool
    ) -> AsyncIterator[Piece]:
        pieces = self.model.chat(sample, asked, max_new_tokens, stream)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def embed(self, samples: Sequence[Sample]) -> Embedded:
        return await self.model.embed(samples)

    async def state(self) -> dict[str, int]:
        return self.model.state()

    def check_health(self) -> None:
        """Ray Serve starts a replica anew where this raises."""
        self.model.check()


class Replicas:
    """The replicas of a model, or of several runs on one base, from the process that answers HTTP."""

    def __init__(self, handle: Any):
        self.handle = handle

    async def chat(
        self, sample: Sample, asked: Asked, max_new_tokens: int | None, stream: bool
    ) -> AsyncIterator[Piece]:
        pieces = self.handle.options(stream=True).chat.remote(sample, asked, max_new_tokens, stream)
        try:
            async for piece in pieces:
                yield piece
        except (RayError, RayServeException) as error:
            raise told(error) from None
        finally:
            pieces.cancel()

    async def embed(self, samples: Sequence[Sample]) -> Embedded:
        answer = self.handle.embed.remote(samples)
        try:
            return await answer  # type: ignore[no-any-return]
        except (RayError, RayServeException) as error:
            raise told(error) from None
        finally:
            answer.cancel()

    async def states(self) -> list[dict[str, int]]:
        """Of the replicas that answer in time."""
        try:
            return await self.handle.broadcast("state").results_async(timeout_s=STATE_SECONDS)  # type: ignore[no-any-return]
        except (RayError, RayServeException, TimeoutError):
            return []


def told(error: Exception) -> ApiError:
    """What a client is told when a replica raised, died, or is too busy."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ApiError):
        return cause
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests wait already; try again soon", "queue_full", retry_after=1)
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return ApiError(500, f"the model failed: {type(cause).__name__}", "model_failed")
    return ApiError(503, "the process that answered has died; try again", "replica_died", retry_after=1)


@serve.deployment(name="http", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
@serve.ingress()
class Ingress:
    """Answers HTTP, and passes the questions on to the replicas of their model.

    `handles`: each with its models by name, and what Offered takes of them.
    """

    def __init__(self, handles: Sequence[tuple[Any, Mapping[str, tuple[int, str]]]], key_file: str, limits: HttpLimits):
        models: dict[str, Offered] = {}
        for handle, about in handles:
            replicas = Replicas(handle)
            models |= {name: Offered(replicas, *args) for name, args in about.items()}
        self.asgi = make_app(models, KeyRing(Path(key_file)) if key_file else None, limits)

    def __serve_build_asgi_app__(self) -> Any:
        return self.asgi


def application(settings: ServeSettings) -> serve.Application:
    """The application of a service. Raises what find_model raises."""
    named, gpus = find_sources(settings), int(ray.cluster_resources().get("GPU", 0))
    if settings.backend == "vllm":
        from ray.serve.llm import build_openai_app  # it imports vLLM

        return build_openai_app(app_arguments(settings, named, gpus > 0))  # type: ignore[no-any-return]

    bases = groups(named)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(bases))
    handles = []
    for number, sources in enumerate(bases):
        wanted = next(iter(sources.values())).config.resources.use_gpu
        gpu = wanted == "yes" or (wanted == "auto" and gpus > 0)
        deployment: Any = serve.deployment(ModelReplica)
        model = deployment.options(
            name=f"model-{number}",
            ray_actor_options={"num_gpus": 1} if gpu else {"num_cpus": cpus // settings.replicas[1] or 1},
            max_ongoing_requests=settings.slots + settings.queue + 8,  # the engine itself says when it is full
            max_queued_requests=max(1, settings.queue),
            logging_config=QUIET,
            health_check_period_s=5.0,
            max_constructor_retry_count=1,
            graceful_shutdown_timeout_s=5.0,
            **settings.scaling,
        )
        about = {
            name: (s.config.data.max_image_pixels, s.config.data.prompt or CAPTION_PROMPT)
            for name, s in sources.items()
        }
        handles.append((model.bind(sources, settings.engine, gpu), about))
    ingress: Any = Ingress
    return ingress.bind(handles, settings.key_file, settings.http)  # type: ignore[no-any-return]


def find_sources(settings: ServeSettings) -> dict[str, ModelSource]:
    """The models by name. Raises what find_model raises, and ConfigError where one is named twice."""
    if len(set(settings.models)) < len(settings.models):
        raise ConfigError(f"a model is named twice: {', '.join(settings.models)}")
    found = {}
    for name in settings.models:
        run, checkpoint = name, None
        if chosen := CHECKPOINT.fullmatch(name):
            run, checkpoint = chosen.groups()
        found[name] = find_model(run, settings.storage, settings.overrides, checkpoint)
    return found


def start(settings: ServeSettings, host: str, port: int) -> None:
    """Start a service on the connected Ray; it answers when this returns.

    Raises ServeError where it does not start, ConfigError, and what find_model raises.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if serve.status().applications:
        raise ConfigError("another service runs on this Ray already; stop it first, or unset RAY_ADDRESS")
    absolute = ServeSettings(**settings.model_dump() | {"storage": storage.absolute(settings.storage)})
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port, "request_timeout_s": settings.seconds + 30},
            logging_config=QUIET,
        )
        serve.run(application(absolute), name=NAME, route_prefix="/", logging_config=QUIET)
    except (RuntimeError, RayError) as error:
        found = serve.status().applications.get(NAME)
        reasons = [one.message for one in found.deployments.values() if one.message] if found else []
        lines = [line.strip() for line in (reasons or [str(error)])[0].splitlines() if line.strip()]
        stop()
        raise ServeError(f"the service did not start: {lines[-1]}") from None


def stop() -> None:
    """End the service; a Ray of others goes on without it."""
    serve.shutdown()
