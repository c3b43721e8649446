"""Benchmark of the service: 16 clients at once over HTTP, against transformers' `generate` of one question at a time.

In: random images of one tile, and questions. Out: Results for clients that ask about the same 4 images, and about
16. Both sides decode the same tokens; images are read, cut and encoded anew in every repetition.
"""

import base64
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
import torch

from jobs.bench.data import jpeg
from jobs.bench.timing import Cost, Result, in_turns, measured

CLIENTS, SAME, TOKENS = 16, 4, 32
TEXTS = ["what colour is the box? red green blue", "how many are there? one two three", "Describe the image."]


def serve_case(model: str, scale: float, repetitions: int) -> list[Result]:
    """Answers per second. The service, its engine and its clients share one process."""
    from smolray.inference.predictor import find_model
    from smolray.model.tiny import build_model

    tokens = max(2, int(TOKENS * scale))
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        source = find_model(str(build_model(model, TEXTS, folder)), "runs", ["model.dtype=float32"])
        return [_compare(source, name, images, tokens, repetitions) for name, images in _CASES.items()]


_CASES = {"serve_same_images": SAME, "serve_other_images": CLIENTS}


def _compare(source: Any, name: str, images: int, tokens: int, repetitions: int) -> Result:
    answers: dict[str, list[list[str]]] = {"ours": [], "plain": []}

    with _service(source) as ask:

        def ours() -> Cost:
            asked = _questions(len(answers["ours"]), images)
            with measured(ray=False) as cost, ThreadPoolExecutor(CLIENTS) as pool:
                answers["ours"].append(list(pool.map(lambda one: ask(*one, tokens), asked)))
            return cost

        generate = _transformers(source)

        def plain() -> Cost:
            asked = _questions(len(answers["plain"]), images)
            with measured(ray=False) as cost:
                answers["plain"].append([generate(*one, tokens) for one in asked])
            return cost

        costs = in_turns({"ours": ours, "plain": plain}, repetitions)
    if answers["ours"] != answers["plain"]:
        raise RuntimeError("the service and transformers answer differently")
    what = f"{CLIENTS} clients ask about {images} images of one tile, {tokens} tokens each"
    peer = "transformers generate, one by one"
    return Result(name, what, CLIENTS, "answer", peer, costs["ours"], costs["plain"], "cpu")


def _questions(repetition: int, images: int) -> list[tuple[bytes, str]]:
    """An image and a question for each client; no two repetitions have an image in common."""
    rng = np.random.default_rng(repetition)
    pictures = [jpeg(rng) for _ in range(images)]
    return [(pictures[n % images], f"{TEXTS[n % len(TEXTS)]} {n}") for n in range(CLIENTS)]


@contextmanager
def _service(source: Any) -> Iterator[Any]:
    """A function that asks a running service."""
    import uvicorn

    from smolray.serve.engine import EngineLimits
    from smolray.serve.http import HttpLimits, Offered, make_app
    from smolray.serve.model import ServedModel

    served = ServedModel({"model": source}, EngineLimits(slots=CLIENTS), torch.device("cpu"))
    served.engine.stop_ids = frozenset()  # every answer has all its tokens
    app = make_app({"model": Offered(served, 10**7)}, None, HttpLimits())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]

    def ask(image: bytes, text: str, tokens: int) -> str:
        uri = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
        body: Any = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=600)
        return str(answer.json()["choices"][0]["message"]["content"])

    yield ask
    server.should_exit = True
    thread.join()
    served.close()


def _transformers(source: Any) -> Any:
    """A function that answers as a plain script with transformers does, from the same tiles."""
    from smolray.data.sample import Conversation, Message, Part, Sample
    from smolray.model.load import load_model
    from smolray.serve.prompt import PromptMaker

    model: Any = load_model(source.config.model).eval()
    model.set_attn_implementation({"text_config": "sdpa"})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    encoder = source.encoder()

    def generate(image: bytes, text: str, tokens: int) -> str:
        turn = Message("user", (Part("image"), Part("text", text)))
        prompt = PromptMaker(encoder)(Sample((image,), Conversation("", (turn,))))
        ids = torch.from_numpy(prompt.ids).long()[None]
        pixels = (torch.from_numpy(prompt.images[0].tiles).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels[None],
                do_sample=False,
                max_new_tokens=tokens,
                use_cache=True,
            )
        return str(encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    return generate
