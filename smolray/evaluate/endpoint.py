"""Evaluation of any server that answers OpenAI's HTTP API, on the validation shards of a run.

In: a run's config, and the address of the server. Out: the EvalReport of its answers. Requests are sent several at a
time; one that is told to come back does.
"""

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import requests
from PIL import Image

from smolray.config import ConfigError, RunConfig
from smolray.data.collate import question_record
from smolray.data.formats.images import open_image
from smolray.data.reader import ShardReader
from smolray.data.sample import Conversation, ShardRow
from smolray.evaluate.evaluator import EvalReport, QuestionRecord, summarize, to_prediction

AT_ONCE, TRIES, TIMEOUT_SECONDS = 16, 20, 600.0
BUSY = (429, 502, 503)


class EndpointError(RuntimeError):
    """The server refuses the questions, or does not answer; the message says what it said."""


@dataclass(frozen=True)
class Endpoint:
    """A server. `url`: up to /v1; `model`: as the server names it; `key`: empty for none."""

    url: str
    model: str
    key: str = ""

    def answer(self, messages: list[dict[str, Any]], max_tokens: int) -> str | None:
        """The greedy answer; None where the question is too long for the model. Raises EndpointError."""
        body: Any = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        address, said = f"{self.url.rstrip('/')}/chat/completions", "nothing"
        for _ in range(TRIES):
            try:
                response = requests.post(address, json=body, headers=headers, timeout=TIMEOUT_SECONDS)
            except requests.RequestException as error:
                raise EndpointError(f"{address} does not answer: {str(error)[:300]}") from None
            if response.ok:
                return str(response.json()["choices"][0]["message"]["content"] or "")
            said = f"{response.status_code} {response.text[:300]}"
            if "context_length" in said:
                return None
            if response.status_code not in BUSY:
                break
            time.sleep(min(30.0, float(response.headers.get("Retry-After") or 1)))
        raise EndpointError(f"{address} answers {said}")


def evaluate_endpoint(config: RunConfig, endpoint: Endpoint) -> EvalReport:
    """Ask the first evaluate.max_samples validation questions.

    Raises ConfigError where there are none, EndpointError.
    """
    if not config.data.validation:
        raise ConfigError("data.validation is not set: there is nothing to evaluate on")
    if config.traits.evaluation != "answers":
        raise ConfigError(f"a run of method={config.method} is measured by a search, which a server cannot do")
    questions = islice(_questions(config), config.evaluate.max_samples)
    limit, answered, left_out = config.evaluate.max_new_tokens, [], 0

    def ask(question: tuple[QuestionRecord, list[dict[str, Any]]]) -> tuple[QuestionRecord, str | None]:
        record, messages = question
        return record, endpoint.answer(messages, limit)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        while some := [*islice(questions, 8 * AT_ONCE)]:  # images are read as they are needed
            for record, text in pool.map(ask, some):
                left_out += text is None
                if text is not None:
                    answered.append(to_prediction(record, text))
    if not answered:
        raise ConfigError(f"no question of {config.data.validation} could be asked")
    return replace(summarize(answered, config.evaluate.metrics), left_out=left_out)


def _questions(config: RunConfig) -> Iterator[tuple[QuestionRecord, list[dict[str, Any]]]]:
    """Record and messages of each validation question, in order."""
    for row in ShardReader.open(config.data.validation).rows():
        for conversation in row.conversations:
            yield question_record(conversation) | {"key": row.key}, _messages(row, conversation)


def _messages(row: ShardRow, conversation: Conversation) -> list[dict[str, Any]]:
    """The turns up to the trained answer, in OpenAI's form."""
    turns = (*conversation.messages, *conversation.chosen)
    last = max((i for i, m in enumerate(turns) if m.role == "assistant" and m.trained), default=len(turns))
    images = iter(row.images)
    messages = []
    for turn in turns[:last]:
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image_url", "image_url": {"url": _data_uri(next(images))}}
            for part in turn.content
        ]
        messages.append({"role": turn.role, "content": content})
    return messages


def _data_uri(image: bytes) -> str:
    kind = open_image(image, 2**62).format or "PNG"
    media = Image.MIME.get(kind, f"image/{kind.lower()}")
    return f"data:{media};base64,{base64.b64encode(image).decode()}"
