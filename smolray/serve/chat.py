"""Answers in the form of OpenAI's chat completions, whole or as server-sent events.

In: a ChatRequest and Pieces. Out: JSON.
"""

import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from smolray.data.sample import Conversation
from smolray.serve.answer import Asked, Piece
from smolray.serve.errors import ApiError
from smolray.serve.schema import ChatRequest

TEMPERATURE = 0.0  # where a request names none: the most likely token, as `smolray generate`


def how_asked(request: ChatRequest, conversation: Conversation, images: Sequence[bytes]) -> Asked:
    """How the answer is decoded. With a seed, the same request has the same answer."""
    digest = hashlib.blake2b(conversation.to_json().encode(), digest_size=16)
    for image in images:
        digest.update(hashlib.blake2b(image, digest_size=16).digest())
    top = request.top_logprobs
    if top and not request.logprobs:
        raise ApiError(400, "top_logprobs is set and logprobs is not true", "", "top_logprobs")
    return Asked(
        model=request.model,
        temperature=TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(62) if request.seed is None else request.seed,
        name=digest.hexdigest(),
        stop=request.stops,
        top_logprobs=(top or 0) if request.logprobs else None,
    )


def completion(model: str, piece: Piece) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": piece.text, "refusal": None},
        "finish_reason": piece.finish,
        "logprobs": _logprobs(piece),
    }
    return _head("chat.completion", model) | {"choices": [choice], "usage": _usage(piece)}


class ChatStream(StreamingResponse):
    """An answer as server-sent events. `at_end` is called however it ends, also where nothing could be sent."""

    def __init__(self, request: ChatRequest, first: Piece, pieces: AsyncGenerator[Piece]):
        self.at_end: Callable[[], None] = lambda: None
        self._pieces = pieces
        super().__init__(
            _events(request, first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()
            await self._pieces.aclose()


async def _events(request: ChatRequest, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """The lines of the stream."""
    head = _head("chat.completion.chunk", request.model)
    wants_usage = bool(request.stream_options and request.stream_options.include_usage)
    if wants_usage:
        head["usage"] = None

    def chunk(delta: dict[str, str], piece: Piece | None = None, finish: str | None = None) -> str:
        logprobs = _logprobs(piece) if piece else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _event(head | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    piece = first
    try:
        while True:
            if piece.text or piece.logprobs:
                yield chunk({"content": piece.text}, piece)
            if piece.finish:
                break
            piece = await anext(pieces)
    except ApiError as error:
        yield _event(error.body)
        return

    yield chunk({}, finish=piece.finish)
    if wants_usage:
        yield _event(head | {"choices": [], "usage": _usage(piece)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _logprobs(piece: Piece) -> dict[str, Any] | None:
    return {"content": list(piece.logprobs), "refusal": None} if piece.logprobs else None


def _usage(piece: Piece) -> dict[str, Any]:
    return {
        "prompt_tokens": piece.prompt_tokens,
        "completion_tokens": piece.tokens,
        "total_tokens": piece.prompt_tokens + piece.tokens,
        "prompt_tokens_details": {"cached_tokens": piece.cached_tokens},
    }
