"""A service in this process, for tests of its HTTP: uvicorn in a thread, on a free port of the loopback."""

import base64
import threading
import time
from contextlib import contextmanager

import uvicorn
from openai import OpenAI

from smolray.inference.predictor import Decoding
from tests.offline import picture
from tests.unit.inference.test_predictor import asked

PROMPTS = ("what is it?", "what colour is it? Answer\nin two lines.", "Describe the image.")


def write_photos(folder, count=4):
    """The folder with pictures of different sizes, 0.png and so on."""
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(64, 40 + 8 * number, number))
    return folder


def generated_answers(model, photos, prompts=PROMPTS):
    """(photo, prompt) -> what `smolray generate` says in 16 tokens."""
    rows = asked(model, photos, Decoding(max_new_tokens=16), prompts=prompts)
    found = {(row["id"].partition("/")[0], row["prompt"]): row["text"] for row in rows}
    assert len(set(found.values())) > 5, "the answers do not vary: a test would show nothing"
    return found


@contextmanager
def serving(app):
    """The address of an app while it runs."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "uvicorn did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def client_of(address, key="none", **options):
    """OpenAI's own client, which does not try again."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120, **options)


def image_part(image, kind="png"):
    """An image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(image).decode()}"}}


def question(text, *images):
    """A user's message: images first, as in training."""
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]}]
