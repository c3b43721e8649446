"""Exports hold what vLLM's and llama.cpp's readers look for; `make slow` runs llama.cpp's converter on them.

vLLM itself is not run: its expectations are those of its `idefics3.py` and `registry.py` (0.32).
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from smolray.export import export_run
from tests.offline import asked, picture, shard_row
from tests.real import MODELS, real_model
from tests.shards import write_shards
from tests.unit.test_export import run_config, write_run

pytestmark = pytest.mark.seconds

PUBLISHED = {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"}  # in vLLM's registry
TEXTS = {"LlamaForCausalLM", "VLlama3ForCausalLM"}  # llama.cpp's LlamaModel, by text_config.architectures


@pytest.fixture(scope="module", params=[*MODELS, "tiny"])
def exported(request, tmp_path_factory, tiny_path):
    """(name, folder of the base model, folder of the export of a run that trained it); tiny's head is tied."""
    folder = tmp_path_factory.mktemp(request.param)
    base = Path(tiny_path) if request.param == "tiny" else real_model(request.param, folder / "base")
    shards = write_shards(str(folder / "shards"), [shard_row([picture(640, 480)], asked("What is it?", "right"))])
    return request.param, base, Path(export_run(write_run(folder, run_config(folder, str(base), shards))))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tensor_names(config: dict) -> set[str]:
    """The tensors that both readers look for, by their own names of the layers."""
    names = {"model.connector.modality_projection.proj.weight"}
    vision, text = "model.vision_model", "model.text_model"
    names |= {f"{vision}.embeddings.patch_embedding.{kind}" for kind in ("weight", "bias")}
    names |= {f"{vision}.embeddings.position_embedding.weight"}
    names |= {f"{vision}.post_layernorm.{kind}" for kind in ("weight", "bias")}
    names |= {f"{text}.embed_tokens.weight", f"{text}.norm.weight"}

    attention = ("q_proj", "k_proj", "v_proj", "out_proj")
    layer = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{name}" for name in attention)]
    for i in range(config["vision_config"]["num_hidden_layers"]):
        names |= {f"{vision}.encoder.layers.{i}.{name}.{kind}" for name in layer for kind in ("weight", "bias")}

    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    layer = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    layer += ["input_layernorm", "post_attention_layernorm"]
    for i in range(config["text_config"]["num_hidden_layers"]):
        names |= {f"{text}.layers.{i}.{name}.weight" for name in layer}
    return names if config["text_config"]["tie_word_embeddings"] else names | {"lm_head.weight"}


def test_architectures_are_those_that_vllm_and_llama_cpp_know(exported):
    config = read(exported[2], "config.json")
    assert len(config["architectures"]) == 1 and set(config["architectures"]) <= PUBLISHED
    assert set(config["text_config"]["architectures"]) <= TEXTS and "quantization_config" not in config


def test_the_weights_are_the_tensors_that_they_look_for_and_no_others(exported):
    name, _, folder = exported
    config = read(folder, "config.json")
    assert config["text_config"]["tie_word_embeddings"] == (name == "tiny")
    assert set(load_file(folder / "model.safetensors")) == tensor_names(config)


def test_rotary_positions_and_sizes_are_where_they_look(exported):
    config = read(exported[2], "config.json")
    text, vision = config["text_config"], config["vision_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] >= 100_000
    assert {"hidden_size", "num_attention_heads", "intermediate_size", "image_size", "patch_size"} <= set(vision)
    assert {"hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size"} <= set(text)
    assert config["scale_factor"] and config["image_token_id"]


def test_the_processor_says_its_class_its_sizes_and_tokens_of_a_tile(exported):
    name, base, folder = exported
    config, processor = read(folder, "config.json"), read(folder, "processor_config.json")
    images = processor["image_processor"] if name == "tiny" else read(folder, "preprocessor_config.json")
    vision = config["vision_config"]
    named = processor.get("processor_class") or images["processor_class"]
    assert named == ("SmolVLMProcessor" if name == "smolvlm2-256m" else "Idefics3Processor")
    assert images["max_image_size"] == {"longest_edge": vision["image_size"]}
    assert images["size"]["longest_edge"] % vision["image_size"] == 0
    tile = (vision["image_size"] // vision["patch_size"]) ** 2 // config["scale_factor"] ** 2
    assert processor["image_seq_len"] == tile
    assert (folder / "tokenizer.json").exists() and (base / "tokenizer.json").exists()
    assert any((folder / template).exists() for template in ("chat_template.json", "chat_template.jinja"))


@pytest.fixture(scope="session")
def converter(tmp_path_factory) -> Path:
    """The folder of llama.cpp's convert_hf_to_gguf.py, as the sources of llama-cpp-python hold it."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--retries=1", "--timeout=20"]
    tools = [*pip, "install", *quiet, f"--target={folder / 'site'}", "--no-deps"]
    tools += ["scikit-build-core", "pathspec", "packaging", "sentencepiece"]
    sources = [*pip, "download", *quiet, "--no-deps", "--no-build-isolation", "--no-binary=:all:", f"--dest={folder}"]
    sources += ["llama-cpp-python==0.3.36"]
    for command in (tools, sources):
        environment = os.environ | {"PYTHONPATH": str(folder / "site")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if "No matching distribution found" in done.stderr:
            pytest.skip("the sources of llama-cpp-python are not here, and PyPI is not reachable to get them")
        assert done.returncode == 0, done.stderr

    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        wanted = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
        members = [m for m in archive if m.name.partition("vendor/llama.cpp/")[2].startswith(wanted)]
        archive.extractall(folder, members, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


READ = """
import json, sys
import gguf, numpy
reader = gguf.GGUFReader(sys.argv[1])
numpy.savez(sys.argv[2], **{t.name: t.data for t in reader.tensors})
long = ("tokens", "merges", "token_type")
print(json.dumps({k: f.contents() for k, f in reader.fields.items() if k.split(".")[-1] not in long and "." in k}))
"""


def converted(converter: Path, folder: Path, out: Path, *options: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, tensors) of the GGUF file that llama.cpp's converter writes."""
    paths = [converter, converter / "gguf-py", next(converter.parents[2].glob("site"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    script = [str(converter / "convert_hf_to_gguf.py"), str(folder), "--outtype=f32", f"--outfile={out}", *options]
    for command in (script, ["-c", READ, str(out), f"{out}.npz"]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    return {k: v for k, v in kept.items() if not k.startswith(("general.", "GGUF."))}, dict(np.load(f"{out}.npz"))


@pytest.mark.slow
def test_llama_cpp_converts_an_export_as_it_converts_the_base_model(exported, converter, tmp_path):
    name, base, folder = exported
    if name == "tiny":
        pytest.skip("llama.cpp knows published tokenizers alone")
    weights, config = load_file(folder / "model.safetensors"), read(folder, "config.json")

    text, tensors = converted(converter, folder, tmp_path / "text.gguf")
    assert text == converted(converter, base, tmp_path / "base.gguf")[0]
    assert text["tokenizer.ggml.pre"] == "smollm", "its digits stand alone, as in tokenizer.json"
    assert text["llama.rope.freq_base"] == config["text_config"]["rope_theta"]
    down = weights["model.text_model.layers.1.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], down)
    np.testing.assert_array_equal(tensors["output.weight"], weights["lm_head.weight"].numpy())

    vision, tensors = converted(converter, folder, tmp_path / "vision.gguf", "--mmproj")
    before = converted(converter, base, tmp_path / "base-vision.gguf", "--mmproj")[0]
    edge = "clip.vision.preproc_image_size"
    assert vision[edge] == read(folder, "preprocessor_config.json")["size"]["longest_edge"] < before[edge]
    assert vision | {edge: 0} == before | {edge: 0}
    projection = weights["model.connector.modality_projection.proj.weight"].numpy()
    np.testing.assert_array_equal(tensors["mm.model.fc.weight"], projection)


def test_a_tied_head_is_told_to_readers_that_ask_the_text_model(tmp_path):
    base = real_model(MODELS[0], tmp_path / "base")
    config = read(base, "config.json") | {"tie_word_embeddings": True}
    config["text_config"]["tie_word_embeddings"] = False  # as transformers 5 ignores it
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    shards = write_shards(str(tmp_path / "shards"), [shard_row([picture(64, 64)], asked("What is it?", "right"))])
    folder = Path(export_run(write_run(tmp_path, run_config(tmp_path, str(base), shards))))
    assert read(folder, "config.json")["text_config"]["tie_word_embeddings"]
    assert set(load_file(folder / "model.safetensors")) == tensor_names(read(folder, "config.json"))
