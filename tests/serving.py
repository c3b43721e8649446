"""A service in this process, for tests of its HTTP: uvicorn in a thread, on a free port of the loopback."""

import base64
import threading
import time
from contextlib import contextmanager

import uvicorn
from openai import OpenAI


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
