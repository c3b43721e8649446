"""A model is loaded with exactly the weights of its files, or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolray.config import ConfigError, ModelConfig
from smolray.engine.pipeline.load import fill
from smolray.engine.pipeline.parameters import ParameterPlacement, placements_of
from smolray.model.load import check_weights, empty_model, load_model


@pytest.fixture
def folder(tiny_path, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def change(folder: Path, work) -> None:
    tensors = load_file(folder / "model.safetensors")
    work(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fill_stage(model: ModelConfig) -> list[ParameterPlacement]:
    """A pipeline of one stage, without a process group."""

    class Everything:
        def owners(self, names):
            return (0,)

    placements = placements_of(empty_model(model), Everything())
    fill(placements, 0, model)
    return placements


NORM, PROJ = "model.text_model.norm.weight", "model.connector.modality_projection.proj.weight"
FAULTS = {
    "missing": (lambda t: t.pop(PROJ), rf"1 weights are missing: {PROJ}"),
    "another shape": (
        lambda t: t.update({NORM: torch.ones(7)}),
        rf"1 weights are of another shape: {NORM} \(\(7,\), expected \(96,\)\)",
    ),
    "too many": (
        lambda t: t.update({"model.extra.weight": torch.ones(2)}),
        "1 weights are not of this model: model.extra",
    ),
    "half": (
        lambda t: [t.pop(name) for name in sorted(t)[::2]],
        r"[0-9]+ weights are missing: (\S+, ){4}\S+ and [0-9]+ more",
    ),
}


@pytest.mark.parametrize("load", [load_model, check_weights, fill_stage])
@pytest.mark.parametrize("name", FAULTS)
def test_weights_that_are_not_the_models_are_refused_with_their_names(folder, name, load):
    if load is fill_stage and name == "too many":
        pytest.skip("a stage reads what it needs; the driver has checked the folder")
    work, message = FAULTS[name]
    change(folder, work)
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig(path=str(folder), dtype="float32"))


def test_a_whole_folder_is_checked_without_reading_its_tensors(folder, monkeypatch):
    monkeypatch.setattr("smolray.model.load.load_model", None)
    check_weights(ModelConfig(path=str(folder)))
    change(folder, lambda t: t.update({"lm_head.weight": t["model.text_model.embed_tokens.weight"].clone()}))
    check_weights(ModelConfig(path=str(folder)))


def test_a_tied_head_may_be_stored_or_not(folder):
    before = load_model(ModelConfig(path=str(folder), dtype="float32")).state_dict()
    change(folder, lambda t: t.update({"lm_head.weight": t["model.text_model.embed_tokens.weight"].clone()}))
    model = ModelConfig(path=str(folder), dtype="float32")
    for name, value in load_model(model).state_dict().items():
        assert torch.equal(value, before[name])
    for placement in fill_stage(model):
        assert torch.equal(placement.parameter, before[placement.name])


@pytest.mark.parametrize("load", [load_model, empty_model])
@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_attention_is_what_the_model_says(tiny_path, load, wanted):
    torch.backends.cuda.enable_cudnn_sdp(not wanted)
    load(ModelConfig(path=tiny_path, cudnn_attention=wanted))
    assert torch.backends.cuda.cudnn_sdp_enabled() is wanted


def test_cudnn_attention_is_off_unless_asked_for(tiny_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(ModelConfig(path=tiny_path))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_the_threshold_of_int8_weights_is_what_the_model_says(tiny_path, threshold):
    model = load_model(ModelConfig(path=tiny_path, load_in_8bit=True, llm_int8_threshold=threshold))
    found = {m.state.threshold for m in model.modules() if type(m).__name__ == "Linear8bitLt"}
    assert found == {threshold}
