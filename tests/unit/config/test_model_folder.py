"""A model folder that is not whole ends each command with one message: the folder, the file, what was expected."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.config import ConfigError, ModelConfig
from smolray.config.model_folder import check_model_folder
from smolray.data.processor import load_processor
from smolray.model.load import load_model
from smolray.pretrained import tensor_files


@pytest.fixture
def folder(tiny_path, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_text(file: Path, **values) -> None:
    change(file, text_config=json.loads(file.read_text())["text_config"] | values)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def shard_that_is_gone(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: is not there \(found "),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds list"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json: is not JSON"),
    "config nests without end": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json: is not JSON"),
    "another family": (lambda f: change(f / "config.json", model_type="llama"), r"model type 'llama'"),
    "a section is a number": (lambda f: change(f / "config.json", text_config=3), r"config\.json has no text_config"),
    "a size is a word": (
        lambda f: change_text(f / "config.json", hidden_size="big"),
        r"config\.json: text_config\.hidden_size = 'big'; expected a whole number",
    ),
    "a size is negative": (
        lambda f: change_text(f / "config.json", num_hidden_layers=-1),
        r"config\.json: text_config\.num_hidden_layers = -1",
    ),
    "too many tokens of a tile": (
        lambda f: change(f / "processor_config.json", image_seq_len=1_000_000_000),
        r"processor_config\.json: image_seq_len = 1000000000; expected 16",
    ),
    "tokens of a tile as a word": (
        lambda f: change(f / "processor_config.json", image_seq_len="many"),
        r"processor_config\.json: image_seq_len = 'many'",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: is not there"),
    "tokenizer is cut": (lambda f: cut(f / "tokenizer.json", 500), r"tokenizer\.json: is not JSON"),
    "template is no Jinja": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}"),
        r"chat_template\.jinja: the chat template is not Jinja",
    ),
    "no header": (lambda f: cut(f / "model.safetensors", 4), r"model\.safetensors: its header cannot be read"),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4096),
        r"model\.safetensors: its header cannot be read",
    ),
    "header is no JSON": (
        lambda f: (f / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 16),
        r"model\.safetensors: its header cannot be read",
    ),
    "weights are cut": (
        lambda f: cut(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        r"model\.safetensors: [0-9,]+ bytes where its header names [0-9,]+",
    ),
    "a shard is gone": (shard_that_is_gone, r"model-00001-of-00002\.safetensors: is not there"),
    "a shard outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        r"model\.safetensors\.index\.json: weight_map",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_way_to_open_a_damaged_folder_names_the_file(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    opened = [
        lambda: check_model_folder(str(folder)),
        lambda: load_model(ModelConfig(path=str(folder))),
        lambda: load_processor(ModelConfig(path=str(folder))),
    ]
    opened += [lambda: tensor_files(str(folder))] if name != "no tokenizer" else []
    for opening in opened:
        with pytest.raises(ConfigError, match=message) as caught:
            opening()
        assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value)


def test_a_folder_without_weights_is_refused_where_they_are_needed(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_model_folder(str(folder), needs=())
    with pytest.raises(ConfigError, match=r"model\.safetensors: is not there \(found pytorch_model\.bin\)"):
        load_model(ModelConfig(path=str(folder)))


def test_a_template_that_fails_while_it_renders_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ConfigError, match=r"its chat template cannot be read .*no"):
        load_processor(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("path", ["/no/such/folder", "./there/is/none", "~/no-such-model"])
def test_a_path_that_is_no_folder_is_refused(path):
    with pytest.raises(ConfigError, match=rf"model\.path = {path}: is not there; expected a model folder"):
        load_model(ModelConfig(path=path))


def test_a_whole_folder_and_a_hub_id_pass(folder):
    check_model_folder(str(folder))
    check_model_folder("HuggingFaceTB/SmolVLM-256M-Instruct")


@pytest.mark.parametrize(
    "name", ["config is no JSON", "too many tokens of a tile", "template is no Jinja", "no header"]
)
@pytest.mark.parametrize("command", ["plan", "preview", "generate"])
def test_commands_end_with_one_message(folder, tmp_path, command, name):
    damage, message = DAMAGES[name]
    damage(folder)
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?", "answer": 4}\n')
    arguments = {
        "plan": ["plan", f"model.path={folder}", "--inventory", "1x rtx4090"],
        "preview": ["preview", f"model.path={folder}", f"data.train={tmp_path / 'rows.jsonl'}"],
        "generate": ["generate", str(folder), str(tmp_path / "rows.jsonl"), "--storage", str(tmp_path / "runs")],
    }
    done = CliRunner().invoke(app, arguments[command])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: model.path = ")
    assert message.partition(":")[0].replace("\\", "") in done.stderr


def test_the_files_of_a_folder_are_read_once_until_one_changes(folder, monkeypatch):
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    check_model_folder(str(folder))
    assert {"config.json", "tokenizer.json"} <= set(opened)

    opened.clear()
    check_model_folder(str(folder), needs=("tokenizer.json",))
    check_model_folder(str(folder), needs=())
    assert opened == []

    change(folder / "tokenizer_config.json", chat_template="{% if %}")
    with pytest.raises(ConfigError, match="the chat template is not Jinja"):
        check_model_folder(str(folder), needs=())


def test_a_folder_that_is_whole_without_weights_is_still_asked_for_them(folder):
    (folder / "model.safetensors").unlink()
    check_model_folder(str(folder), needs=("tokenizer.json",))
    with pytest.raises(ConfigError, match=r"model\.safetensors: is not there"):
        check_model_folder(str(folder))
