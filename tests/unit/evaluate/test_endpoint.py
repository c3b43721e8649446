"""`smolray evaluate --endpoint`: what a server of OpenAI's API answers is measured as what the model answers here."""

import http.server
import json
import threading

import pytest
import torch

from smolray.config import ConfigError, RunConfig
from smolray.data.collate import Group, collate_prompts
from smolray.data.reader import ShardReader
from smolray.evaluate.endpoint import Endpoint, EndpointError, evaluate_endpoint
from smolray.evaluate.evaluator import summarize, to_prediction
from smolray.inference.predictor import Decoding, Predictor, find_model
from smolray.serve.engine import EngineLimits
from smolray.serve.http import HttpLimits, Offered, make_app
from smolray.serve.keys import KeyRing, add_key
from smolray.serve.model import ServedModel
from tests.server import serving
from tests.shards import vqa_rows, write_shards

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_path):
    folder = tmp_path_factory.mktemp("endpoint")
    shards = write_shards(str(folder / "shards"), vqa_rows("test", 12))
    return RunConfig(
        name="demo",
        storage=str(folder),
        model={"path": tiny_path, "dtype": "float32"},
        data={"train": shards, "validation": shards},
        evaluate={"max_new_tokens": 6},
    )


def test_a_server_is_measured_as_the_model_itself(config, tiny_path, tmp_path):
    source = find_model(tiny_path, "runs")
    predictor = Predictor(source, Decoding(max_new_tokens=6), torch.device("cpu"))
    want = []
    for row in ShardReader.open(config.data.validation).rows():
        batch = collate_prompts([Group(row, tuple(range(len(row.conversations))))], source.encoder())
        texts = predictor.answers(batch, batch.meta["ids"])
        want += [to_prediction(record, text) for record, text in zip(batch.meta["records"], texts, strict=True)]
    assert len({one["prediction"] for one in want}) > 3, "the answers do not vary: this test would show nothing"

    key = add_key(tmp_path / "keys.json", "tests")
    # 16 are asked at a time: some are told to come back
    served = ServedModel({"demo": source}, EngineLimits(slots=2, queue=2), torch.device("cpu"))
    with serving(make_app({"demo": Offered(served, 10**6)}, KeyRing(tmp_path / "keys.json"), HttpLimits())) as address:
        report = evaluate_endpoint(config, Endpoint(f"{address}/v1", "demo", key))
        with pytest.raises(EndpointError, match="401"):
            evaluate_endpoint(config, Endpoint(f"{address}/v1", "demo"))
        with pytest.raises(EndpointError, match="no model 'other'"):
            evaluate_endpoint(config, Endpoint(f"{address}/v1", "other", key))
        few = evaluate_endpoint(config.replace({"evaluate.max_samples": 3}), Endpoint(f"{address}/v1", "demo", key))
        with pytest.raises(ConfigError, match="could be asked"):
            long = config.replace({"evaluate.max_new_tokens": 100_000})
            evaluate_endpoint(long, Endpoint(f"{address}/v1", "demo", key))
    served.close()
    assert report.predictions == want and report.accuracy == summarize(want).accuracy
    assert few.predictions == want[:3]


class Broken(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(json.dumps({"error": {"message": "it is broken"}}).encode())

    def log_message(self, *_):
        pass


def test_a_server_that_fails_or_is_not_there_is_named(config):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(EndpointError, match=r"answers 500 .*it is broken"):
        evaluate_endpoint(config, Endpoint(url, "demo"))
    server.shutdown()
    server.server_close()
    with pytest.raises(EndpointError, match="does not answer"):
        evaluate_endpoint(config, Endpoint(url, "demo"))
