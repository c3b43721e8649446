"""Exports of published models, read by others: transformers 5, and a real transformers 4.57 installed for the test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolray.data.sample import Conversation
from smolray.export import export_run, write_config_for_others
from tests.offline import asked, hf_messages, picture, shard_row
from tests.real import MODELS, golden_ids, real_model
from tests.shards import write_shards
from tests.unit.data.test_tiles import decode
from tests.unit.test_export import run_config, write_run

pytestmark = pytest.mark.seconds

PHOTO = picture(640, 480)
QUESTION = asked("What are these?\n\n1 bus, 22 cars", "right")


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(name, folder of the published model with thin weights, folder of the export of a run that trained it)"""
    folder = tmp_path_factory.mktemp(request.param)
    base = real_model(request.param, folder / "base")
    shards = write_shards(str(folder / "shards"), [shard_row([PHOTO], QUESTION)])
    run = write_run(folder, run_config(folder, str(base), shards))
    return request.param, base, Path(export_run(run))


def test_files_of_the_tokenizer_are_byte_identical(exported):
    _, base, folder = exported
    names = {file.name for file in base.iterdir()} - {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"} <= names
    assert {name for name in names if (folder / name).read_bytes() != (base / name).read_bytes()} == set()


def test_no_file_beside_those_of_the_base_model_is_written_but_the_card(exported):
    _, base, folder = exported
    assert {f.name for f in folder.iterdir()} - {f.name for f in base.iterdir()} == {"README.md"}


def test_config_has_the_names_of_transformers_4_and_5(exported):
    _, base, folder = exported
    config, before = (json.loads((f / "config.json").read_text()) for f in (folder, base))
    theta = before["text_config"]["rope_theta"]
    assert theta > 10_000
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"] == theta
    for part in (config, config["text_config"], config["vision_config"]):
        assert part["torch_dtype"] == part["dtype"] == "float32"


def test_scaled_rotary_positions_have_the_names_of_transformers_4_and_5(exported, tmp_path):
    config = AutoConfig.from_pretrained(exported[1])
    want = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
    config.text_config.rope_parameters = want
    config.save_pretrained(tmp_path)
    write_config_for_others(tmp_path / "config.json", tied=False)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 500_000.0 and text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters == want


def test_transformers_5_loads_it_with_the_golden_ids(exported):
    name, _, folder = exported
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    before = json.loads((exported[1] / "config.json").read_text())["text_config"]
    assert model.dtype == torch.float32
    assert model.config.text_config.rope_parameters["rope_theta"] == before["rope_theta"]
    assert ids_of(PreTrainedTokenizerFast.from_pretrained(folder), name) == golden_ids(name)["with_added_tokens"]


def test_the_card_says_what_a_stock_call_does(exported):
    name, _, folder = exported
    card = (folder / "README.md").read_text()
    edge = {"smolvlm-2.2b": 768}.get(name, 1024)
    assert f"as training did: it scales the longest edge to {edge} pixels" in card
    assert "transformers 4.55 to 4.57 number the patches of a tile wrongly" in card
    assert ("or load the model with `dtype=torch.bfloat16`" in card) == (name != "smolvlm-2.2b")
    assert ("PreTrainedTokenizerFast.from_pretrained(folder)" in card) == (name != "smolvlm2-256m")


def ids_of(tokenizer, name: str) -> dict[str, list[int]]:
    return {t: tokenizer(t, add_special_tokens=False)["input_ids"] for t in golden_ids(name)["with_added_tokens"]}


def stock_inputs(folder: Path, conversation: Conversation) -> dict[str, torch.Tensor]:
    """What the stock processor makes of a conversation and the photograph."""
    settings = json.loads((folder / "processor_config.json").read_text())
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        image_seq_len=settings["image_seq_len"],
        chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"],
    )
    text = processor.apply_chat_template(hf_messages(conversation))
    return dict(processor(text=[text], images=[[decode(PHOTO)]], return_tensors="pt"))


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory) -> dict[str, str]:
    """The environment of a Python that imports transformers 4.57, and all else from where this one has it."""
    site = tmp_path_factory.mktemp("transformers-4")
    packages = ["transformers==4.57.*", "tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1"]
    options = ["--quiet", "--no-deps", "--retries=1", "--timeout=20", "--disable-pip-version-check", f"--target={site}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *packages], capture_output=True, text=True, timeout=300
    )
    if "No matching distribution found" in done.stderr:
        pytest.skip("transformers 4.57 is not installed here, and PyPI is not reachable to install it")
    assert done.returncode == 0, done.stderr
    return os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}


READER = """
import json, sys
from pathlib import Path
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

assert transformers.__version__.startswith("4.57."), transformers.__version__
folder, work = map(Path, sys.argv[1:])
asked = json.loads((work / "asked.json").read_text())

tokenizer = AutoTokenizer.from_pretrained(folder)
ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]}
(work / "ids.json").write_text(json.dumps(ids))

model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
assert model.dtype == torch.float32
inputs = load_file(work / "inputs.safetensors")


def right_positions(embedding, args):
    # Number the patches of whole tiles one after the other: 4.57 does it wrongly, transformers' issue 41190
    return (torch.arange(embedding.num_embeddings).expand_as(args[0]),)


with torch.no_grad():
    outputs = {"as it is": model(**inputs).logits}
    numbered = model.model.vision_model.embeddings.position_embedding.register_forward_pre_hook(right_positions)
    outputs["right positions"] = model(**inputs).logits
    numbered.remove()
    outputs["bfloat16"] = model.bfloat16()(**inputs).logits.float()
if asked["processor"]:
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(asked["messages"])
    outputs |= processor(text=[text], images=[[Image.open(work / "photo.png")]], return_tensors="pt")
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, work / "outputs.safetensors")
"""


@pytest.mark.slow
def test_transformers_4_57_reads_the_same_model(exported, transformers_4, tmp_path):
    name, _, folder = exported
    stock = name != "smolvlm2-256m"  # the processor of SmolVLM2 wants torchvision
    asked_for = {
        "texts": list(golden_ids(name)["with_added_tokens"]),
        "messages": hf_messages(QUESTION),
        "processor": stock,
    }
    inputs = stock_inputs(folder, QUESTION)
    (tmp_path / "asked.json").write_text(json.dumps(asked_for))
    (tmp_path / "photo.png").write_bytes(PHOTO)
    save_file({key: value.contiguous() for key, value in inputs.items()}, tmp_path / "inputs.safetensors")

    command = [sys.executable, "-c", READER, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=transformers_4, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ids.json").read_text()) == golden_ids(name)["with_added_tokens"]

    got = load_file(tmp_path / "outputs.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        want, want_16 = model(**inputs).logits, model.bfloat16()(**inputs).logits.float()
    torch.testing.assert_close(got["right positions"], want, atol=1e-4, rtol=1e-4)
    assert (got["as it is"] - want).abs().max() > 0.01, "it numbers patches rightly: take the warning off the card"
    assert torch.allclose(got["bfloat16"], want_16, atol=1e-2) == (name != "smolvlm-2.2b"), "the card says so"
    assert inputs["pixel_values"].shape[1] == 5  # 640 x 480: as many tiles as training made
    if stock:
        for key, value in inputs.items():
            torch.testing.assert_close(got[key], value)
