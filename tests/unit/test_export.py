"""An exported folder is the trained model, for plain transformers; where it is not, there is no folder."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from smolray import export
from smolray.config import RunConfig
from smolray.export import ExportError, export_adapter, export_run, few_samples
from smolray.model.adapters import prepare_for_training, trainable
from smolray.model.load import load_model
from smolray.model.trained import merged_model, trained_model
from smolray.model_card import CardDetails, model_card
from smolray.run import checkpoint
from smolray.run.checkpoint import CheckpointError, Progress
from smolray.run.folder import RunFolder
from smolray.run.state import EngineState, canonical_name
from tests.commands import smolray
from tests.losses import sft_sum
from tests.offline import files_under
from tests.shards import vqa_rows, write_shards

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(str(tmp_path_factory.mktemp("shards")), vqa_rows("train", 12))


def write_run(folder: Path, config: RunConfig, step: int = 3, **metrics: float) -> str:
    """A run folder as training leaves it: config and a checkpoint, its weights moved away from where they began."""
    torch.manual_seed(step)
    model = prepare_for_training(load_model(config.model), config)
    weights = {
        canonical_name(n): (p + 0.05 * torch.randn_like(p)).detach().float() for n, p in trainable(model).items()
    }
    checkpoint.save(config.run_dir, EngineState(weights), Progress(step=step, samples=70), metrics, {})
    (folder / config.name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config.run_dir


def run_config(tmp_path, tiny_path, shards, model=None, **sections) -> RunConfig:
    settings = {"path": tiny_path, "dtype": "float32"} | (model or {})
    return RunConfig(
        name="my-run", storage=str(tmp_path), model=settings, data={"train": shards, "max_length": 1024}, **sections
    )


def logits(model, batch):
    """By the stock forward of transformers, one unpacked conversation."""
    pixels = ((batch.pixel_values.float() / 255 - 0.5) / 0.5)[batch.tile_order][None].to(model.dtype)
    return model(
        input_ids=batch.input_ids, pixel_values=pixels, attention_mask=torch.ones_like(batch.input_ids)
    ).logits.float()


def one_sample(config):
    from smolray.data.collate import Group, collate_training
    from smolray.data.encode import cached_encoder

    row = random.Random(0).choice(vqa_rows("train", 12))
    alone = config.data.replace({"packing": "none"})
    return collate_training([Group(row, (0,))], cached_encoder(config.model, alone, config.image))


LORA = {"r": 4, "lora_alpha": 16, "groups": ["text", "vision"]}
RUNS = {
    "full": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "text only": {"model": {"train": ["text"]}},
    "lora": {"lora": LORA, "model": {"train": []}},
    "dora": {"lora": LORA | {"use_dora": True, "use_rslora": True, "ranks": {"vision": 2}}, "model": {"train": []}},
    "lora and connector": {"lora": LORA, "model": {"train": ["connector"]}},
    "pissa": {"lora": LORA | {"init_lora_weights": "pissa", "ranks": {"vision": 2}}, "model": {"train": []}},
    "olora": {"lora": LORA | {"init_lora_weights": "olora", "use_rslora": True}, "model": {"train": []}},
    "modules to save": {"lora": LORA | {"modules_to_save": ["embed_tokens", "connector"]}, "model": {"train": []}},
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_exported_folder_is_the_trained_model_for_transformers(tmp_path, tiny_path, shards, kind):
    config = run_config(tmp_path, tiny_path, shards, **RUNS[kind])
    run = write_run(tmp_path, config)
    folder = export_run(run)
    assert folder == f"{run}/export"

    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == {"bfloat16": torch.bfloat16}.get(kind, torch.float32) and loaded.config.use_cache
    assert not any("lora" in name or "base_layer" in name for name in loaded.state_dict())
    trained, untrained = trained_model(config, checkpoint.latest(run)), load_model(config.model).eval()
    batch, tolerance = one_sample(config), 0.05 if kind == "bfloat16" else 1e-4
    with torch.no_grad():
        want, got, before = logits(trained, batch), logits(loaded, batch), logits(untrained, batch)
        assert float((want - got).abs().max() / want.abs().max()) < tolerance
        assert float((want - before).abs().max() / want.abs().max()) > 0.1, (
            "training changed nothing: this test would show nothing"
        )
        assert float(sft_sum(loaded, batch)) == pytest.approx(float(sft_sum(trained, batch)), rel=tolerance)

    processor, messages = (
        AutoProcessor.from_pretrained(folder),
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    from PIL import Image

    inputs = processor(text=[text], images=[[Image.new("RGB", (64, 64), "red")]], return_tensors="pt").to(loaded.dtype)
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_files_hold_no_pickle(tmp_path, tiny_path, shards):
    files = files_under(export_run(write_run(tmp_path, run_config(tmp_path, tiny_path, shards))))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".md", ".jinja"}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_tampered_weight_stops_the_export_and_leaves_no_folder(tmp_path, tiny_path, shards, kind, monkeypatch):
    config = run_config(tmp_path, tiny_path, shards, **RUNS[kind])
    run = write_run(tmp_path, config)

    def tampered(*args):
        model = merged_model(*args)
        with torch.no_grad():
            model.model.text_model.layers[1].mlp.down_proj.weight[:8] += 0.5
        return model

    monkeypatch.setattr(export, "merged_model", tampered)
    with pytest.raises(ExportError, match="logits differ"):
        export_run(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (Path(run) / "export").exists()


def test_a_folder_that_is_not_an_export_is_left_alone(tmp_path, tiny_path, shards):
    run = write_run(tmp_path, run_config(tmp_path, tiny_path, shards))
    mine = tmp_path / "home"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="holds files that are not an export"):
        export_run(run, str(mine))
    assert (mine / "thesis.txt").exists()
    folder = export_run(run, str(tmp_path / "out"))
    assert export_run(run, folder) == folder  # an earlier export is replaced


def test_a_model_that_says_nothing_but_nan_is_not_exported(tmp_path, tiny_path, shards):
    config = run_config(tmp_path, tiny_path, shards)
    weights = {
        canonical_name(n): torch.full_like(p, 1e38)  # finite weights, and sums that are not
        for n, p in trainable(prepare_for_training(load_model(config.model), config)).items()
    }
    run = write_run(tmp_path, config)
    checkpoint.save(run, EngineState(weights), Progress(step=4), {}, {})
    with pytest.raises(ExportError):
        export_run(run)
    assert not (Path(run) / "export").exists()


def test_the_best_checkpoint_is_taken_and_another_by_name(tmp_path, tiny_path, shards):
    config = run_config(tmp_path, tiny_path, shards)
    run = write_run(tmp_path, config, step=1, accuracy=0.9)
    write_run(tmp_path, config, step=2, accuracy=0.4)
    write_run(tmp_path, config, step=3)
    name = "model.connector.modality_projection.proj.weight"
    for chosen, step in ((None, 1), ("latest", 3), ("step-00000002", 2)):
        folder = export_run(run, name=chosen)
        want = checkpoint.load_state(checkpoint.verify(RunFolder(run).checkpoint(step))).weights[name]
        assert torch.equal(load_file(Path(folder) / "model.safetensors")[name], want)
        assert f"to step {step} " in (Path(folder) / "README.md").read_text()
    with pytest.raises(CheckpointError, match="step-00000009"):
        export_run(run, name="step-00000009")


def test_a_run_without_a_whole_checkpoint_says_so(tmp_path, tiny_path, shards):
    run = write_run(tmp_path, run_config(tmp_path, tiny_path, shards))
    (Path(run) / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        export_run(run)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, tiny_path, shards):
    run = write_run(tmp_path, run_config(tmp_path, tiny_path, shards))
    other = run_config(tmp_path, tiny_path, shards, **RUNS["lora"])
    (Path(run) / "config.yaml").write_text(yaml.safe_dump(other.model_dump(mode="json")))
    with pytest.raises(ValueError, match="train different parameters"):
        export_run(run)


def test_the_model_card_has_data_settings_and_accuracy(tmp_path, tiny_path, shards):
    config = run_config(tmp_path, tiny_path, shards, **RUNS["lora"], seed=77)
    run = write_run(tmp_path, config, accuracy=0.875)
    result = {"accuracy": {"overall": 0.875, "shape": 0.5}, "accuracy_counts": {"overall": 800, "shape": 200}}
    (Path(run) / "result.json").write_text(json.dumps(result))
    card = (Path(export_run(run)) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# my-run" in card
    assert "| overall | 0.8750 | 800 |" in card and "| shape | 0.5000 | 200 |" in card
    assert "LoRA r=4 on text, vision" in card and "to step 3 (70 samples)" in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings["data"]["train"] == f"…/{Path(shards).name}" and str(tmp_path) not in card
    assert RunConfig.model_validate(settings) == config.replace(
        {
            "storage": settings["storage"],
            "model.path": settings["model"]["path"],
            "data.train": settings["data"]["train"],
        }
    )


def test_the_model_card_of_a_search_has_its_scores(tmp_path, tiny_path, shards):
    config = run_config(tmp_path, tiny_path, shards, method="retrieval", engine={"stage": 0})
    run = write_run(tmp_path, config)
    (Path(run) / "result.json").write_text(
        json.dumps({"accuracy": {"overall": 0.5}, "accuracy_counts": {"overall": 24}})
    )
    card = model_card(config, run, checkpoint.latest(run), CardDetails(), "")
    assert "texts whose image is found first" in card and "| overall | 0.5000 | 24 |" in card
    assert "exact match" not in card.split("## Settings")[0] and "decoding" not in card.split("## Settings")[0]


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_adapters_are_never_merged_into_quantised_weights(tmp_path, tiny_path, shards, quantised):
    import bitsandbytes as bnb

    config = run_config(
        tmp_path,
        tiny_path,
        shards,
        model={"train": [], quantised: True, "dtype": "bfloat16"},
        lora=LORA | {"groups": ["text"]},
    )
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    assert any(isinstance(m, kinds) for m in prepare_for_training(load_model(config.model), config).modules()), (
        "nothing was quantised"
    )
    run = write_run(tmp_path, config)
    assert not any(isinstance(m, kinds) for m in merged_model(config, checkpoint.latest(run)).modules())
    folder = Path(export_run(run))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and not any("lora" in name for name in tensors)
    # Exactly the unquantised base plus the adapter, and not what quantisation has left of it.
    name, weights = "model.text_model.layers.0.self_attn.q_proj", checkpoint.load_state(checkpoint.latest(run)).weights
    base = load_model(config.model.replace({quantised: False})).state_dict()[f"{name}.weight"].float()
    a, b = (next(t for key, t in weights.items() if key.startswith(name) and f"lora_{x}" in key) for x in "AB")
    torch.testing.assert_close(tensors[f"{name}.weight"].float(), base + b @ a * (16 / 4), atol=2e-2, rtol=2e-2)


def test_what_quantisation_took_from_the_answers_is_said_and_has_a_limit(tmp_path, tiny_path, shards, monkeypatch):
    config = run_config(
        tmp_path, tiny_path, shards, model={"train": [], "load_in_4bit": True}, lora=LORA | {"groups": ["text"]}
    )
    run = write_run(tmp_path, config)
    folder = export_run(run)
    said = re.search(
        r"over 4-bit weights: its answers diverge from those of the model as it was trained by (\S+) nats",
        (Path(folder) / "README.md").read_text(),
    )
    assert said and 0 < float(said[1]) < export.DIVERGENCE["4-bit"]
    monkeypatch.setitem(export.DIVERGENCE, "4-bit", 0.0)
    with pytest.raises(ExportError, match="diverge from those of the model trained over 4-bit weights"):
        export_run(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_exported_adapters_of_a_quantised_run_give_its_logits_in_peft(tmp_path, tiny_path, shards):
    from peft import PeftModel

    config = run_config(
        tmp_path,
        tiny_path,
        shards,
        model={"train": [], "load_in_8bit": True},
        lora=LORA | {"groups": ["text"], "ranks": {"text": 2}},
    )
    run = write_run(tmp_path, config)
    folder = export_adapter(run)
    assert json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_path
    batch = few_samples(config)
    want = export.logits(trained_model(config, checkpoint.latest(run)), batch)
    torch.testing.assert_close(export.logits(PeftModel.from_pretrained(load_model(config.model), folder), batch), want)


@pytest.mark.parametrize("kind", ["full", "lora and connector"])
def test_adapters_alone_are_refused_where_more_was_trained(tmp_path, tiny_path, shards, kind):
    run = write_run(tmp_path, run_config(tmp_path, tiny_path, shards, **RUNS[kind]))
    with pytest.raises(ExportError, match="more than adapters"):
        export_adapter(run)


def test_the_samples_compared_hold_pictures_and_several_questions(tmp_path, tiny_path, shards):
    batch = few_samples(run_config(tmp_path, tiny_path, shards))
    assert len(batch.pixel_values) >= 4 and batch.samples >= 8


@pytest.mark.parametrize("kind", ["pissa", "olora", "modules to save"])
def test_exported_adapters_give_the_trained_model_in_peft_on_the_model_as_it_was_loaded(
    tmp_path, tiny_path, shards, kind
):
    """PiSSA and OLoRA train over other weights than those of the folder that PEFT loads."""
    from peft import PeftModel

    config = run_config(tmp_path, tiny_path, shards, **RUNS[kind])
    run = write_run(tmp_path, config)
    folder = export_adapter(run)
    stock = AutoModelForImageTextToText.from_pretrained(tiny_path, dtype=torch.float32)
    loaded, batch = PeftModel.from_pretrained(stock, folder).eval(), one_sample(config)
    with torch.no_grad():
        want = logits(trained_model(config, checkpoint.latest(run)), batch)
        torch.testing.assert_close(logits(loaded, batch), want, atol=1e-4, rtol=1e-4)
        before = logits(load_model(config.model).eval(), batch)
    assert float((want - before).abs().max() / want.abs().max()) > 0.1, "training changed nothing"
    settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True, "PEFT would take a part out of the weights when it loads them"
    whole = {"model.text_model.embed_tokens", "model.connector", "lm_head"} if kind == "modules to save" else set()
    assert set(settings["modules_to_save"] or ()) == whole, "the head is tied to the embeddings"


def test_loftq_is_merged_into_what_4_bits_left_of_the_weights(tmp_path, tiny_path, shards):
    """Its adapters hold what rounding took: on the weights as they were they would add that a second time."""
    lora = LORA | {"groups": ["text"], "init_lora_weights": "loftq", "r": 16}
    model = {"train": [], "load_in_4bit": True}
    config = run_config(tmp_path, tiny_path, shards, model=model, lora=lora)
    run, batch = write_run(tmp_path, config), few_samples(config)
    trained = export.logits(trained_model(config, checkpoint.latest(run)), batch)
    merged = export.logits(merged_model(config, checkpoint.latest(run)), batch)
    # what the linear layers without adapters have lost is all that is left
    torch.testing.assert_close(merged, trained, atol=2e-2 * float(trained.abs().max()), rtol=0)

    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load_model(config.model), export_adapter(run))
    torch.testing.assert_close(export.logits(loaded, batch), trained)
    assert export_run(run)


def test_while_a_run_trains_each_checkpoint_is_a_model_for_transformers_and_peft(tmp_path, tiny_path, shards):
    from peft import PeftModel

    from tests.unit.cli.test_results import hold

    config = run_config(tmp_path, tiny_path, shards, **RUNS["lora"])
    run = write_run(tmp_path, config, step=3)
    want = {3: trained_model(config, checkpoint.latest(run))}
    write_run(tmp_path, config, step=5)
    want[5] = trained_model(config, checkpoint.latest(run))
    process = hold(run, "train")
    try:
        listed = smolray("checkpoints", "my-run", "--storage", str(tmp_path)).output
        assert "step-00000003" in listed and "step-00000005" in listed
        for step, adapter in ((3, ["--adapter"]), (5, [])):
            out = str(tmp_path / f"out-{step}")
            options = ["--checkpoint", f"step-{step:08d}", "--out", out, "--storage", str(tmp_path)]
            done = smolray("export", "my-run", *options, *adapter)
            assert done.exit_code == 0, done.output
            stock = AutoModelForImageTextToText.from_pretrained(tiny_path if adapter else out, dtype=torch.float32)
            loaded, batch = PeftModel.from_pretrained(stock, out) if adapter else stock, one_sample(config)
            with torch.no_grad():
                torch.testing.assert_close(
                    logits(loaded.eval(), batch), logits(want[step], batch), atol=1e-4, rtol=1e-4
                )
    finally:
        process.kill()
        process.wait()
