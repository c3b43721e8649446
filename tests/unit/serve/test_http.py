"""OpenAI's own client against the service: answers are those of `smolray generate`, and what is refused is told why."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
import torch

from smolray.inference.predictor import find_model
from smolray.serve.engine import EngineLimits
from smolray.serve.http import HttpLimits, Offered, make_app
from smolray.serve.keys import KeyRing, add_key, revoke_key
from smolray.serve.model import ServedModel
from tests.offline import picture
from tests.server import serving
from tests.serving import client_of, generated_answers, image_part, question, write_photos

pytestmark = pytest.mark.seconds

LIMITS = HttpLimits(request_bytes=2**20, images=3, seconds=60.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def generated(tiny_path, photos):
    """(photo, prompt) -> what `smolray generate` says."""
    return generated_answers(tiny_path, photos)


@pytest.fixture(scope="module")
def model(tiny_path):
    served = ServedModel({"tiny": find_model(tiny_path, "runs")}, EngineLimits(slots=32, queue=64), torch.device("cpu"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return KeyRing(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def address(model, ring):
    with serving(make_app({"tiny": Offered(model, 10_000)}, ring, LIMITS)) as address:
        yield address


@pytest.fixture(scope="module")
def key(ring):
    return add_key(ring.path, "tests")


@pytest.fixture(scope="module")
def client(address, key):
    return client_of(address, key)


def ask(client, photo, prompt, **how):
    return client.chat.completions.create(
        model="tiny", messages=question(prompt, photo.read_bytes()), **{"max_tokens": 16, **how}
    )


def test_answers_about_an_image_are_those_of_generate(client, photos, generated):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "smolray"
    for (photo, prompt), text in generated.items():
        done = ask(client, photos / photo, prompt)
        assert done.choices[0].message.content == text
        assert done.choices[0].finish_reason in ("stop", "length")
        assert done.usage.completion_tokens <= 16 < done.usage.prompt_tokens
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_32_clients_at_once_get_the_answers_of_generate(client, model, photos, generated):
    before = model.engine.counts.images_encoded
    questions = list(generated) * 3
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda q: ask(client, photos / q[0], q[1]).choices[0].message.content, questions[:32]))
    assert answers == [generated[q] for q in questions[:32]]
    assert model.engine.counts.images_encoded - before <= 4


def test_a_stream_is_the_same_text_in_pieces_and_tells_the_usage_at_its_end(client, photos, generated):
    most = 0
    for (photo, prompt), text in generated.items():
        chunks = list(ask(client, photos / photo, prompt, stream=True, stream_options={"include_usage": True}))
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(deltas) == text
        most = max(most, sum(map(bool, deltas)))
        whole = ask(client, photos / photo, prompt)
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
        assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices][-1] == whole.choices[0].finish_reason
    assert most > 2, "no answer came in pieces"


def test_several_images_and_turns_and_none(client, photos):
    first, second = ((photos / name).read_bytes() for name in ("0.png", "1.png"))
    messages = [{"role": "system", "content": "Be short."}, *question("and both?", first, second)]
    both = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    swapped = [messages[0], *question("and both?", second, first)]
    assert both.choices[0].message.content
    assert client.chat.completions.create(model="tiny", messages=swapped, max_tokens=16) != both
    again = [*messages, {"role": "assistant", "content": "a box"}, {"role": "user", "content": "what colour?"}]
    longer = client.chat.completions.create(model="tiny", messages=again, max_tokens=16)
    assert longer.usage.prompt_tokens > both.usage.prompt_tokens
    assert longer.usage.prompt_tokens_details.cached_tokens > 0
    none = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "2?"}], max_tokens=4)
    assert none.usage.prompt_tokens < 30


def test_stop_seed_and_logprobs(client, photos, generated):
    (photo, prompt), text = max(generated.items(), key=lambda item: len(item[1]))
    stop = text[len(text) // 2 :][:3]
    done = ask(client, photos / photo, prompt, stop=[stop]).choices[0]
    assert done.message.content == text[: text.index(stop)].strip() and done.finish_reason == "stop"
    one, two, other = (
        ask(client, photos / photo, prompt, temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert one == two != other
    told = ask(client, photos / photo, prompt, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(token.logprob == max(t.logprob for t in token.top_logprobs) <= 0 for token in told)
    assert len(told) == 16 and "".join(token.token for token in told[:2]).strip() in text


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model": "nope"}, 404, "there is no model 'nope' here; there: tiny"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected a question"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "not Unicode"),
        ({"max_tokens": 100_000}, 400, "context"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop text is empty"),
        ({"top_logprobs": 3}, 400, "logprobs is not true"),
        ({"n": 2}, 400, "n is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty is not supported"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_at_fault(client, change, status, told):
    request = {"model": "tiny", "messages": question("what?"), "max_tokens": 4} | change
    answer = requests.post(
        f"{client.base_url}chat/completions",
        data=json.dumps(request),
        headers={"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"},
        timeout=60,
    )
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert told in error["message"], error


def test_fields_for_bookkeeping_and_neutral_values_are_taken(client, photos):
    done = ask(client, photos / "0.png", "?", n=1, user="me", presence_penalty=0.0, store=False, logit_bias={})
    assert done.choices


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("data:image/png;base64,AAAA", "corrupt_image"),
        ("data:image/png;base64,!!!", "corrupt_image"),
        ("data:nothing", "no comma"),
        ("data:,", "empty_image"),
        ("/etc/passwd", "neither a data: URI"),
        ("file:///etc/passwd", "neither a data: URI"),
        ("s3://bucket/x.png", "neither a data: URI"),
        ("http://127.0.0.1/x.png", "not among the hosts"),
        ("https://example.com/x.png", "not among the hosts"),
    ],
)
def test_a_wrong_image_is_refused(client, url, told):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4)


def test_too_many_and_too_large_images_and_requests_are_refused(client, photos):
    small = (photos / "0.png").read_bytes()
    with pytest.raises(openai.BadRequestError, match="4 images; at most 3"):
        client.chat.completions.create(model="tiny", messages=question("?", *[small] * 4), max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=r"200 x 200 pixels; the limit .* is 10000"):
        client.chat.completions.create(model="tiny", messages=question("?", picture(200, 200)), max_tokens=4)
    with pytest.raises(openai.APIStatusError, match="more than 1048576 bytes") as refused:
        client.chat.completions.create(model="tiny", messages=question("x" * 2**20), max_tokens=4)
    assert refused.value.status_code == 413
    headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": "application/json"}
    parts = (b"x" * 2**16 for _ in range(100))  # without Content-Length
    answer = requests.post(f"{client.base_url}chat/completions", data=parts, headers=headers, timeout=60)
    assert answer.status_code == 413


def test_text_that_names_a_file_or_an_image_stays_text(client, tmp_path):
    plain = client.chat.completions.create(model="tiny", messages=question("<image>"), max_tokens=4)
    assert plain.usage.prompt_tokens < 40
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(64, 64))
    named = client.chat.completions.create(model="tiny", messages=question(f"<img>{secret}</img>"), max_tokens=4)
    assert named.usage.prompt_tokens < 200


def test_images_come_over_http_only_from_named_hosts_and_never_from_private_addresses(model):
    limits = HttpLimits(image_hosts=("localhost", "127.0.0.1"))
    content = [{"type": "image_url", "image_url": {"url": "http://localhost:1/x.png"}}, {"type": "text", "text": "?"}]
    app = make_app({"tiny": Offered(model, 10_000)}, None, limits)
    with serving(app) as address, pytest.raises(openai.BadRequestError, match="not a public address"):
        client_of(address).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4
        )


def test_without_a_known_key_nothing_is_answered_but_health(address, ring, client, photos):
    for key, told in (("none", "not known"), ("sk-smolray-wrong", "not known")):
        with pytest.raises(openai.AuthenticationError, match=told):
            ask(client_of(address, key), photos / "0.png", "?")
    for path in ("v1/models", "v1/models/tiny", "metrics"):
        assert requests.get(f"{address}/{path}", timeout=60).status_code == 401
    for path in ("v1/chat/completions", "v1/embeddings"):
        answer = requests.post(f"{address}/{path}", json={}, timeout=60)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(f"{address}/health", timeout=60).json() == {"status": "ok"}
    second = add_key(ring.path, "second")
    assert ask(client_of(address, second), photos / "0.png", "?").choices
    revoke_key(ring.path, "second")
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(client_of(address, second), photos / "0.png", "?")
    assert ask(client, photos / "0.png", "?").choices


@pytest.mark.parametrize("path", ["/", "/v1", "/docs", "/openapi.json", "/v1/completions"])
def test_what_is_not_there_is_told_in_openai_s_form(address, path):
    answer = requests.get(f"{address}{path}", timeout=60)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_refused(address, key):
    for body in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"[]"):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        answer = requests.post(f"{address}/v1/chat/completions", data=body, headers=headers, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:10]
    answer = requests.post(f"{address}/v1/chat/completions", data=b"{}", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 415


@pytest.fixture(scope="module")
def endless(tiny_path):
    """A model whose answers end only where they are cut; one is decoded, and one waits."""
    served = ServedModel({"tiny": find_model(tiny_path, "runs")}, EngineLimits(slots=1, queue=1), torch.device("cpu"))
    served.engine.stop_ids = frozenset()
    yield served
    served.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(endless, stream):
    body = {"model": "tiny", "messages": question("tell me"), "max_tokens": 6000, "stream": stream}
    with serving(make_app({"tiny": Offered(endless, 10_000)}, None, HttpLimits())) as address:
        hang_up(address, endless, body)


def hang_up(address, model, body):
    content = json.dumps(body).encode()
    host, port = address.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    cancelled = model.engine.counts.cancelled
    with socket.create_connection((host, int(port))) as one:
        one.sendall(head.encode() + content)
        wait_for(lambda: model.state()["running"] == 1)
    wait_for(lambda: model.state()["running"] == 0)
    assert model.engine.counts.cancelled == cancelled + 1 and model.state()["pages_in_use"] == 0


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(0.02)


def test_a_full_line_and_a_late_answer_are_told(endless):
    with serving(make_app({"tiny": Offered(endless, 10_000)}, None, HttpLimits(seconds=3.0))) as address:
        client, ends = client_of(address), []

        def long():
            try:
                client.chat.completions.create(model="tiny", messages=question("tell me"), max_tokens=6000)
                ends.append("answered")
            except openai.APIStatusError as error:
                ends.append((error.status_code, error.response.headers.get("Retry-After")))

        threads = [threading.Thread(target=long) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ends) == 6 and set(ends) == {(429, "1"), (504, None)}, ends
        wait_for(lambda: endless.state()["running"] == endless.state()["waiting"] == 0)
        streamed = client.chat.completions.create(
            model="tiny", messages=question("tell me"), max_tokens=6000, stream=True
        )
        with pytest.raises(openai.APIError, match="not answered within 3 s"):
            list(streamed)
        assert client.chat.completions.create(model="tiny", messages=question("?"), max_tokens=2).choices


def test_metrics_tell_requests_tokens_and_slots(address, client, key, photos):
    def read():
        text = requests.get(f"{address}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=60).text
        lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    ask(client, photos / "0.png", "what is it?")
    # an answer is sent before its slot is given back
    wait_for(lambda: read()['smolray_engine_running{model="tiny"}'] == 0)
    values = read()
    path = 'path="/v1/chat/completions"'
    assert values[f'smolray_requests_total{{model="tiny",{path},status="200"}}'] >= 1
    assert values['smolray_engine_answer_tokens{model="tiny"}'] > 0
    assert values["smolray_open_requests"] == 0


def test_a_retrieval_run_embeds_texts_and_images_as_search_does(tiny_path, photos):
    from smolray.data.collate import Group, collate_prompts
    from smolray.data.sample import Conversation
    from smolray.inference.image_search import Embedder
    from tests.offline import message, shard_row

    source = find_model(tiny_path, "runs", ["method=retrieval"])
    embedder, image = Embedder(source, torch.device("cpu")), (photos / "1.png").read_bytes()
    rows = [
        shard_row([], Conversation("", (message("user", "a red box"),))),
        shard_row([image], Conversation("", (message("user", None, "Describe the image."),))),
    ]
    want = embedder(collate_prompts([Group(row, (0,)) for row in rows], source.encoder()))
    served = ServedModel({"finder": source}, EngineLimits(), torch.device("cpu"))
    offered = Offered(served, 10_000, "Describe the image.")
    with serving(make_app({"finder": offered}, None, LIMITS)) as address:
        client = client_of(address)
        made = client.embeddings.create(model="finder", input=["a red box", image_part(image)])
        assert np.allclose([one.embedding for one in made.data], want, atol=1e-5) and made.usage.prompt_tokens > 8
        plain = client.embeddings.create(model="finder", input="a red box", encoding_format="float")
        assert np.allclose(plain.data[0].embedding, want[0], atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="POST /v1/embeddings"):
            client.chat.completions.create(model="finder", messages=question("?"))
    served.close()
