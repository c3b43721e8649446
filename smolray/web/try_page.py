"""The page Try: an image and a question, answered by one model or by two side by side, as they speak.

In: a server of OpenAI's API, such as `smolray serve`. Out: the page; the text of an answer, streamed. The key of the
server stays here.
"""

import json
from collections.abc import Iterator
from typing import Any

import requests
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from smolray.web.files import NotFoundError
from smolray.web.site import Ask, Endpoint, page

IMAGE_BYTES = 32 * 2**20  # of a request with its image
MOST_TOKENS = 512
LOOK_SECONDS, ANSWER_SECONDS = 5.0, 300.0


def show(ask: Ask) -> Response:
    """GET /try."""
    models, fault = [], ""
    try:
        models = model_names(_endpoint(ask))
    except (OSError, ValueError, LookupError, TypeError) as error:  # an error of requests is an OSError
        fault = f"{_endpoint(ask).url} does not list its models: {str(error)[:300]}"
    return page(ask, "try.html", "Try", models=models, fault=fault, endpoint=_endpoint(ask).url)


def answer(ask: Ask) -> Response:
    """POST /try/ask: the text of the answer as it comes."""
    endpoint, image, question = _endpoint(ask), ask.form.get("image", ""), ask.form.get("question", "").strip()
    if not question:
        return PlainTextResponse("ask something", 400)
    if image and not image.startswith("data:image/"):
        return PlainTextResponse("expected an image", 400)
    try:
        response = requests.post(
            f"{endpoint.url}/chat/completions",
            json=_body(ask.form.get("model", ""), question, image),
            headers=endpoint.headers,
            stream=True,
            timeout=(LOOK_SECONDS, ANSWER_SECONDS),
        )
    except requests.RequestException as error:
        return PlainTextResponse(f"{endpoint.url} does not answer: {str(error)[:300]}", 502)
    if not response.ok:
        with response:
            return PlainTextResponse(f"{endpoint.url} answers {response.status_code}: {_message(response)}", 502)
    return StreamingResponse(pieces(response), media_type="text/plain; charset=utf-8")


def model_names(endpoint: Endpoint) -> list[str]:
    """The models that the server offers."""
    response = requests.get(f"{endpoint.url}/models", headers=endpoint.headers, timeout=LOOK_SECONDS)
    response.raise_for_status()
    return [str(card["id"]) for card in response.json()["data"]]


def pieces(response: requests.Response) -> Iterator[str]:
    """The text in the server's events. The browser that leaves closes the request, which frees its slot there."""
    with response:
        for line in response.iter_lines():
            name, _, data = line.decode("utf-8", "replace").partition(":")
            if name != "data" or data.strip() == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                yield f" ({event['error'].get('message', 'the answer broke off')})"
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""


def _body(model: str, question: str, image: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": MOST_TOKENS}


def _message(response: requests.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return response.text[:300]


def _endpoint(ask: Ask) -> Endpoint:
    if ask.site.endpoint is None:
        raise NotFoundError("no server to ask was named: smolray web --endpoint http://127.0.0.1:8000/v1")
    return ask.site.endpoint
