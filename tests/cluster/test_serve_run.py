"""`smolray serve` on Ray Serve: the answers of `smolray generate`, slots that come back, a replica that is killed."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from smolray.serve.keys import add_key
from tests.ray_head import free_port
from tests.serving import client_of, generated_answers, lora_run, question, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def generated(tiny_path, photos):
    return generated_answers(tiny_path, photos)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_path):
    """Two runs of LoRA on the tiny model."""
    return [lora_run(tmp_path_factory.mktemp("runs"), tiny_path, "run", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def client(ray_cluster, tiny_path, runs, key_file):
    from ray import serve

    from smolray.serve.deployment import start
    from smolray.serve.settings import ServeSettings

    key, port = add_key(key_file, "tests"), free_port()
    start(ServeSettings(models=[tiny_path, *runs], key_file=str(key_file)), "127.0.0.1", port)
    client = client_of(f"http://127.0.0.1:{port}", key)
    client.name = tiny_path
    yield client
    serve.shutdown()


def ask(client, photo, prompt, **how):
    messages = question(prompt, photo.read_bytes())
    return client.chat.completions.create(model=client.name, messages=messages, **{"max_tokens": 16, **how})


def numbers(client):
    """The service's metrics by name, without labels."""
    headers = {"Authorization": f"Bearer {client.api_key}"}
    text = requests.get(str(client.base_url).replace("/v1/", "/metrics"), headers=headers, timeout=60).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(0.1)


def test_32_clients_at_once_get_the_answers_of_generate_streamed_and_whole(client, photos, generated):
    questions = (list(generated) * 3)[:32]

    def answer(number):
        photo, prompt = questions[number]
        if number % 2:
            return ask(client, photos / photo, prompt).choices[0].message.content
        chunks = ask(client, photos / photo, prompt, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(answer, range(32)))
    assert answers == [generated[q] for q in questions]
    found = numbers(client)
    assert found["smolray_engine_images_encoded"] == 4
    assert (
        found["smolray_engine_running"] == found["smolray_engine_pages_in_use"] == found["smolray_open_requests"] == 0
    )


def test_runs_on_the_same_base_answer_in_its_process(ray_cluster, client, runs, photos):
    actors = [a["name"] for a in ray_cluster.util.list_named_actors(all_namespaces=True) if "#model-" in a["name"]]
    assert len(actors) == 1, actors
    for run in runs:
        for (photo, prompt), text in generated_answers(run, photos).items():
            done = client.chat.completions.create(
                model=run, messages=question(prompt, (photos / photo).read_bytes()), max_tokens=16
            )
            assert done.choices[0].message.content == text


def test_refusals_of_the_replica_reach_the_client_as_they_are(client, photos):
    with pytest.raises(openai.BadRequestError, match="the model's context"):
        ask(client, photos / "0.png", "?", max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="POST /v1/chat/completions"):
        client.embeddings.create(model=client.name, input="x")
    with pytest.raises(openai.AuthenticationError):
        ask_with_wrong_key(client)


def ask_with_wrong_key(client):
    other = client_of(str(client.base_url).removesuffix("/v1/"), "wrong")
    return other.chat.completions.create(model=client.name, messages=question("?"), max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(client, stream):
    body = {"model": client.name, "messages": question("tell me"), "max_tokens": 8000, "stream": stream, "seed": 5}
    content = json.dumps(body | {"temperature": 0.8}).encode()
    before = numbers(client)["smolray_engine_cancelled"]
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.api_key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as one:
        one.sendall(head.encode() + content)
        wait_for(lambda: numbers(client)["smolray_engine_running"] == 1)
    wait_for(lambda: numbers(client)["smolray_engine_running"] == 0)
    found = numbers(client)
    assert found["smolray_engine_cancelled"] == before + 1
    assert found["smolray_engine_pages_in_use"] == found["smolray_open_requests"] == 0


def test_a_killed_replica_is_told_to_its_clients_and_comes_back(ray_cluster, client, photos, generated):
    ends = []

    def long():
        try:
            chunks = ask(client, photos / "0.png", "tell me", max_tokens=7000, stream=True, temperature=0.8, seed=5)
            ends.append([chunk.choices[0].finish_reason for chunk in chunks][-1])
        except openai.APIError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=long) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: numbers(client).get("smolray_engine_running", 0) >= 3)
    for actor in ray_cluster.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == "serve" and "model-0" in actor["name"]:
            ray_cluster.kill(ray_cluster.get_actor(actor["name"], namespace="serve"), no_restart=True)
    for thread in threads:
        thread.join(60)
    assert len(ends) == 4 and all("has died; try again" in end for end in ends), ends

    (photo, prompt), text = next(iter(generated.items()))

    def answers():
        try:
            return ask(client, photos / photo, prompt).choices[0].message.content == text
        except openai.InternalServerError:
            return False

    wait_for(answers)
    assert numbers(client)["smolray_open_requests"] == 0
