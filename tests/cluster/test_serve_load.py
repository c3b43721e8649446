"""Ten minutes of load on a service of two replicas: clients that vanish or send garbage, and replicas that are killed.

Nothing crashes, no slot leaks, memory stays flat, and every accepted request is answered right or told why.
SMOLRAY_LOAD_SECONDS makes it shorter or longer.
"""

import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter

import openai
import psutil
import pytest
import requests

from smolray.serve.keys import add_key
from tests.serving import client_of, generated_answers, image_part, question, write_photos

SECONDS = float(os.environ.get("SMOLRAY_LOAD_SECONDS", "600"))
PROMPTS = ("what is it?", "what colour is it?", "Describe the image.")
MIB = 2**20
TOLD = (429, 503, 504)  # full, a replica has died, not in time


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 6)


@pytest.fixture(scope="module")
def client(ray_cluster, tiny_path, tmp_path_factory):
    from ray import serve

    from smolray.serve.deployment import start
    from smolray.serve.settings import ServeSettings

    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    key = add_key(keys, "tests")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    limits = {"slots": 4, "queue": 4, "request_mib": 1, "seconds": 60.0}
    start(ServeSettings(models=[tiny_path], key_file=str(keys), replicas=(2, 2), **limits), "127.0.0.1", port)
    client = client_of(f"http://127.0.0.1:{port}", key)
    client.name = tiny_path
    yield client
    serve.shutdown()


class Load:
    """Clients of several kinds until the time is over."""

    def __init__(self, client, answers):
        self.client, self.answers, self.ends = client, list(answers.items()), Counter()
        self.wrong, self.over = [], threading.Event()
        self.headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"}
        self.url = f"{client.base_url}chat/completions"

    def good(self, rng):
        """Asks, and looks at the answer."""
        (photo, prompt), text = rng.choice(self.answers)
        stream = rng.random() < 0.5
        try:
            told = self.client.chat.completions.create(
                model=self.client.name, messages=question(prompt, photo.read_bytes()), max_tokens=16, stream=stream
            )
            if stream:
                said = "".join(chunk.choices[0].delta.content or "" for chunk in told)
            else:
                said = told.choices[0].message.content
            self.ends["answered"] += 1
            if said != text:
                self.wrong.append((prompt, said, text))
        except openai.APIStatusError as error:
            self.ends[error.status_code] += 1
            if error.status_code not in TOLD or not error.body:
                self.wrong.append((prompt, error.status_code, str(error)))
            time.sleep(0.1)
        except openai.APIError as error:  # in the middle of a stream
            self.ends["told in the stream"] += 1
            if "try again" not in str(error):
                self.wrong.append((prompt, str(error)))

    def vanishing(self, rng):
        """Hangs up while it sends, waits or reads."""
        body = {"model": self.client.name, "messages": question("tell me"), "max_tokens": 4000}
        body |= {"stream": rng.random() < 0.5, "temperature": 0.9, "seed": rng.randint(0, 9)}
        content = json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(content)}\r\n\r\n"
        whole = head.encode() + content
        with socket.create_connection(("127.0.0.1", self.client.base_url.port)) as one:
            one.sendall(whole[: rng.choice([len(whole), len(whole), len(whole) - 5, 40])])
            time.sleep(rng.random())
        self.ends["vanished"] += 1

    def garbage(self, rng):
        """Sends what is refused."""
        huge = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\x00\x00\x00"
        bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in ((b"IHDR", huge), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
        )
        message = {"model": self.client.name, "max_tokens": 4}
        body, expected = rng.choice(
            [
                (rng.randbytes(rng.randint(0, 2000)), 400),
                (b"[" * 50_000, 400),
                (b'"' + b"x" * 2 * MIB + b'"', 413),
                (json.dumps(message | {"messages": question("?", bomb)}).encode(), 400),
                (json.dumps(message | {"messages": question("?", rng.randbytes(500))}).encode(), 400),
                (
                    json.dumps(message | {"messages": [{"role": "user", "content": [image_part(b"")] * 20}]}).encode(),
                    400,
                ),
                (json.dumps(message | {"messages": question("?"), "max_tokens": 10**9}).encode(), 400),
            ]
        )
        headers = self.headers
        if rng.random() < 0.2:
            headers, expected = headers | {"Authorization": "Bearer wrong"}, 401
        try:
            answer = requests.post(self.url, data=body, headers=headers, timeout=60)
        except requests.ConnectionError:  # refused before all of it was sent
            self.ends["cut off"] += 1
            return
        self.ends["refused"] += 1
        told = "json" in answer.headers.get("content-type", "") and answer.json()["error"]["message"]
        if answer.status_code not in (expected, *TOLD) or not told:
            self.wrong.append((body[:80], answer.status_code, dict(answer.headers), answer.text[:200]))

    def run(self, seconds, kinds):
        def repeat(act, seed):
            rng = random.Random(seed)
            while not self.over.is_set():
                try:
                    act(rng)
                except Exception as error:
                    self.wrong.append((act.__name__, repr(error)))

        threads = [threading.Thread(target=repeat, args=(act, seed)) for seed, act in enumerate(kinds)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        try:
            while (second := time.monotonic() - began) < seconds:
                yield second
        finally:
            self.over.set()
            for thread in threads:
                thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a client waits for ever"


def processes():
    """The memory in MiB of the processes of the service that are up, by pid and kind."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.cmdline()[0] if process.cmdline() else ""
            up = any(kind in name for kind in ("ServeReplica", "ProxyActor", "ServeController"))
            if up and "__init__" not in name:
                kind = name.split(":")[-1].partition(".")[0]
                found[process.pid, kind] = process.memory_full_info().uss / MIB
        except psutil.Error:
            continue
    return found


def numbers(client):
    text = requests.get(
        str(client.base_url).replace("/v1/", "/metrics"),
        headers={"Authorization": f"Bearer {client.api_key}"},
        timeout=60,
    ).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_load_with_vanishing_and_hostile_clients_and_killed_replicas(ray_cluster, client, photos, tiny_path):
    expected = generated_answers(tiny_path, photos, PROMPTS)
    answers = {(photos / photo, prompt): text for (photo, prompt), text in expected.items()}
    load = Load(client, answers)
    kills = [SECONDS * 0.55, SECONDS * 0.4]
    memory = {}  # of each process, (second, MiB)
    for second in load.run(SECONDS, [load.good] * 4 + [load.vanishing] * 2 + [load.garbage] * 2):
        if kills and second > kills[-1]:
            kills.pop()
            names = [
                a["name"] for a in ray_cluster.util.list_named_actors(all_namespaces=True) if "model-0" in a["name"]
            ]
            ray_cluster.kill(ray_cluster.get_actor(names[0], namespace="serve"), no_restart=True)
        for process, size in processes().items():
            memory.setdefault(process, []).append((second, size))
        time.sleep(1)

    print(dict(load.ends))
    assert not kills and not load.wrong, (len(load.wrong), load.wrong[:5])
    assert load.ends["answered"] > SECONDS / 2 and load.ends["vanished"] > 10 and load.ends["refused"] > 10, load.ends
    deadline = time.monotonic() + 60
    while any(numbers(client)[f"smolray_{n}"] for n in ("open_requests", "engine_running", "engine_pages_in_use")):
        assert time.monotonic() < deadline, numbers(client)
        time.sleep(0.5)

    lives = {process: memory[process] for process in processes().keys() & memory.keys()}
    long = {process: life for process, life in lives.items() if life[-1][0] - life[0][0] > SECONDS / 4}
    kinds = Counter(kind for _, kind in long)
    assert kinds["http"] == 1 and kinds["model-0"], kinds
    for process, life in long.items():
        warm, last = life[len(life) // 2], life[-1]
        print(process, warm, last)
        assert last[1] < 1.1 * warm[1] + 20, (process, warm, last)
