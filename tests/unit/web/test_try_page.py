"""Questions about an image go to a server of OpenAI's API, and its answer comes as it is spoken."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from smolray.serve.keys import KeyRing, add_key
from smolray.web.sessions import Sessions
from smolray.web.site import Endpoint
from tests.webpages import Browser, site_of

WORDS = ["a ", "red ", "box <b>"]


class Server(BaseHTTPRequestHandler):
    """Speaks OpenAI's stream, as `smolray serve` does."""

    def do_GET(self):
        self._say(200, json.dumps({"data": [{"id": "base"}, {"id": "tuned"}]}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.headers["authorization"], asked))
        if asked["model"] == "none":
            self._say(404, json.dumps({"error": {"message": "there is no model 'none' here"}}))
            return
        events = [{"choices": [{"delta": {"content": word}}]} for word in WORDS]
        self._say(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _say(self, status, text):
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with running() as server:
        yield server


@contextmanager
def running():
    """The server; `asked`: what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(tmp_path, server):
    site = site_of(tmp_path / "runs")
    site.endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "secret-key")
    return site


def test_an_answer_is_streamed_and_the_key_of_the_server_stays_here(site, server):
    browser = Browser(site)
    page = browser.get("/try").text
    assert "<option>base</option>" in page and "<option>tuned</option>" in page and "secret-key" not in page
    image = "data:image/png;base64,AA+/"
    answer = browser.post("/try/ask", page="/try", model="tuned", question="what is it?", image=image)
    assert answer.text == "a red box <b>" and answer.headers["content-type"].startswith("text/plain")
    key, asked = server.asked[0]
    assert key == "Bearer secret-key" and asked["model"] == "tuned" and asked["temperature"] == 0
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "text"]
    assert asked["messages"][0]["content"][0]["image_url"]["url"] == image


def test_what_the_server_refuses_is_told(site, server):
    browser = Browser(site)
    answer = browser.post("/try/ask", page="/try", model="none", question="x")
    assert answer.status_code == 502 and "there is no model 'none' here" in answer.text
    assert browser.post("/try/ask", page="/try", model="base", question=" ").status_code == 400
    other = browser.post("/try/ask", page="/try", model="base", question="x", image="http://127.0.0.1/secret")
    assert other.status_code == 400 and len(server.asked) == 1
    site.endpoint = Endpoint("http://127.0.0.1:1/v1")
    assert "does not list its models" in browser.get("/try").text


def test_a_key_that_only_asks_sees_this_page_alone(site, server, tmp_path):
    keys = tmp_path / "keys.json"
    site.sessions = Sessions(KeyRing(keys), ("view", "infer"))
    browser = Browser(site, add_key(keys, "asks", ("infer",)))
    assert browser.get("/try").status_code == 200 and browser.get("/").status_code == 403
    assert ">Runs<" not in browser.get("/try").text
    viewer = Browser(site, add_key(keys, "looks", ("view",)))
    assert viewer.get("/try").status_code == 403 and viewer.post("/try/ask").status_code == 403


def test_without_a_server_the_page_says_how_to_name_one(tmp_path):
    browser = Browser(site_of(tmp_path / "runs"))
    assert "--endpoint" in browser.get("/try").text and ">Try<" not in browser.get("/").text
