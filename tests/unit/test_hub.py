"""An export reaches the hub by huggingface_hub's own client. The hub's HTTP API stands in on this machine."""

import base64
import hashlib
import json
import re
import runpy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from smolray.hub import HubError, push_folder
from smolray.model_card import CardDetails, model_card
from smolray.run import checkpoint
from tests.commands import smolray
from tests.unit.test_export import RUNS, run_config, write_run
from tests.unit.test_export import shards as shards  # the fixture

pytestmark = pytest.mark.seconds

TOKEN = "hf_of_this_test"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes commits, and large files by LFS. `server.repos`: id -> private, files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repos = self.server.repos
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid user token"}, 401)
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in repos:
                return self._answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            repos[name] = {
                "private": asked.get("visibility") == "private" or asked.get("private", False),
                "files": {},
                "large": {},
            }
            return self._answer({"url": f"{self.server.url}/{name}"})

        name = next(n for n in repos if n in self.path)
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "lfs" if p.endswith(".safetensors") else "regular"} for p in files]
            return self._answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            puts = [o | {"actions": {"upload": {"href": f"{self.server.url}/put/{name}/{o['oid']}"}}} for o in objects]
            return self._answer({"transfer": "basic", "objects": puts}, kind="application/vnd.git-lfs+json")
        if "/branch/" in self.path:
            repos[name]["branches"] = [self.path.rsplit("/", 1)[1]]
            return self._answer({})
        if "/commit/" in self.path:
            repos[name]["revision"] = self.path.rsplit("/", 1)[1]
            self._commit(repos[name], [json.loads(line) for line in body.splitlines()])
            url = f"{self.server.url}/{name}/commit/abc"
            return self._answer({"commitUrl": url, "commitOid": "abc", "success": True})
        return self._answer({"error": self.path}, 404)

    def _commit(self, repo, operations):
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo["files"][value["path"]] = repo["large"][value["oid"]]

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[1]
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == oid
        repo = next(r for n, r in self.server.repos.items() if f"/put/{n}/" in self.path)
        repo["large"][oid] = data
        self._answer({})

    def do_GET(self):
        self._answer({"error": "Repository not found"}, 404)

    def _answer(self, record, status=200, kind="application/json"):
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub's API; the client takes it for the hub."""
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read when the client was imported
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()


def test_an_export_is_pushed_with_a_card_that_the_hub_reads(hub, tmp_path, tiny_path, shards, monkeypatch):
    run = write_run(tmp_path, run_config(tmp_path, tiny_path, shards, **RUNS["lora"]))
    command = ["export", "my-run", "--storage", str(tmp_path), "--push-to-hub", "me/cars", "--private"]
    refused = smolray(*command)
    assert refused.exit_code == 2 and "set HF_TOKEN" in refused.output and not hub.repos

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = smolray(*command, "--license", "apache-2.0", "--language", "en", "--revision", "v1")
    assert done.exit_code == 0 and f"{hub.url}/me/cars/commit/abc" in done.output, done.output
    repo = hub.repos["me/cars"]
    assert (repo["branches"], repo["revision"]) == (["v1"], "v1")
    assert repo["private"] is True and TOKEN not in done.output
    files = {file.name: file.read_bytes() for file in (tmp_path / "my-run" / "export").iterdir()}
    assert repo["files"] == files and "model.safetensors" in files
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (head["license"], head["language"], head["tags"]) == ("apache-2.0", "en", ["smolray", "sft", "lora"])
    assert run


def test_a_push_that_the_hub_refuses_says_where_the_export_is(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubError, match=rf"me/cars was not pushed: .*401.*the export is in {tmp_path}"):
        push_folder(str(tmp_path), "me/cars", False, "hf_wrong", hub.url)
    with pytest.raises(HubError, match="not a name was not pushed"):
        push_folder(str(tmp_path), "not a name", False, TOKEN, hub.url)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubError, match="was not pushed"):
        push_folder(str(tmp_path), "me/cars", False, TOKEN, hub.url)


def test_the_card_names_base_model_data_and_metrics_with_their_intervals(tmp_path, tiny_path, shards):
    from huggingface_hub import ModelCard

    config = run_config(tmp_path, tiny_path, shards, **RUNS["lora"])
    run = write_run(tmp_path, config)
    metric = {"value": 0.875, "low": 0.85, "high": 0.9, "samples": 800}
    (tmp_path / "my-run" / "result.json").write_text(json.dumps({"metrics": {"exact_match": {"overall": metric}}}))
    hub_id = config.replace({"model.path": "HuggingFaceTB/SmolVLM-256M-Instruct"})
    card = ModelCard(model_card(hub_id, run, checkpoint.latest(run), CardDetails(adapter=True), ""))
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"], card.data.library_name) == (
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "adapter",
        "peft",
    )
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.875)
    assert result.metric_args == {"low": 0.85, "high": 0.9, "samples": 800}
    assert card.data.datasets is None, "the shards of this run are no data set of the hub"


def snippet(folder):
    """The code of a card's quick start."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(
    ("kind", "model"), [("full", {}), ("lora", {}), ("lora", {"load_in_4bit": True}), ("lora", {"load_in_8bit": True})]
)
def test_the_quick_start_of_a_card_runs(tmp_path, published_path, shards, kind, model, monkeypatch, capsys):
    """As it stands, where the folder is; of adapters with the path of the base model, which a card does not tell.

    Widths are multiples of 64: on CPUs with AVX512-BF16, bitsandbytes cannot repack other 4-bit weights to infer.
    """
    sections = RUNS[kind] | ({"model": RUNS[kind]["model"] | model, "lora": {"r": 4}} if model else {})
    write_run(tmp_path, run_config(tmp_path, published_path, shards, **sections))
    adapter = [] if kind == "full" else ["--adapter"]
    done = smolray("export", "my-run", "--storage", str(tmp_path), *adapter)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "my-run" / ("adapter" if adapter else "export")
    code = snippet(folder).replace(f"…/{Path(published_path).name}", published_path)
    assert ("load_in_" in code) == bool(model) and ("PeftModel" in code) == bool(adapter)
    (tmp_path / "ask.py").write_text(code)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    ran = runpy.run_path(str(tmp_path / "ask.py"))
    assert ran["answer"].shape[1] >= 1 and capsys.readouterr().out.endswith("\n")


def test_a_pushed_card_asks_the_model_of_its_repository(tmp_path, tiny_path, shards):
    config = run_config(tmp_path, tiny_path, shards)
    run = write_run(tmp_path, config)
    card = model_card(config, run, checkpoint.latest(run), CardDetails(repo="me/cars"), "")
    assert 'AutoProcessor.from_pretrained("me/cars")' in card
    finder = config.replace({"method": "retrieval"})
    assert "Quick start" not in model_card(finder, run, checkpoint.latest(run), CardDetails(), "")
