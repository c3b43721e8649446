"""What Ray Serve LLM is told of a model that vLLM answers with, and what is refused before anything starts."""

import importlib.util

import pytest

from smolray.config import ConfigError
from smolray.inference.predictor import find_model
from smolray.serve.settings import ServeSettings
from smolray.serve.vllm import MODE, MODEL, app_arguments
from tests.commands import refused
from tests.serving import lora_run


def told(path, *overrides, gpu=True, **limits):
    settings = ServeSettings(models=["demo"], backend="vllm", **limits)
    arguments = app_arguments(settings, {"demo": find_model(path, "runs", overrides)}, gpu)
    assert arguments["ingress_deployment_config"] == {"ray_actor_options": {"num_cpus": 0}}
    [config] = arguments["llm_configs"]
    return config


def test_the_engine_is_told_of_the_tiles_and_tokens_of_training(tiny_path):
    engine = told(tiny_path, "image.max_tiles=5", "image.upscale=true")["engine_kwargs"]
    assert engine["mm_processor_kwargs"] == {"longest_edge": None, "max_tiles": 5, "upscale": True}
    assert engine["hf_overrides"] == {"architectures": [MODEL]} and engine["tokenizer_mode"] == MODE
    assert engine["dtype"] == "float32"
    assert engine["max_model_len"] == find_model(tiny_path, "runs").encoder().max_length


def test_the_limits_of_the_service_are_those_of_the_engine(tiny_path):
    config = told(tiny_path, slots=4, queue=6, images=2, kv_gib=0.5, replicas=(1, 3), image_hosts=["example.org"])
    engine, deployment = config["engine_kwargs"], config["deployment_config"]
    assert (engine["max_num_seqs"], engine["limit_mm_per_prompt"]) == (4, {"image": 2})
    assert engine["allowed_media_domains"] == ["example.org"] and engine["kv_cache_memory_bytes"] == 2**29
    assert deployment["max_ongoing_requests"] == 10
    assert deployment["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4}
    assert config["accelerator_config"] == {"kind": "gpu"}
    assert told(tiny_path, gpu=False)["accelerator_config"] == {"kind": "cpu"}
    assert told(tiny_path, replicas=(2, 2))["deployment_config"]["num_replicas"] == 2


def test_a_limit_that_it_does_not_know_is_refused(tiny_path):
    with pytest.raises(ConfigError, match="--request-mib is no limit of --backend vllm"):
        told(tiny_path, request_mib=8)
    with pytest.raises(ConfigError, match="--seconds is no limit of --backend vllm"):
        told(tiny_path, seconds=10)


def test_no_image_is_fetched_from_a_host_that_nobody_named(tiny_path):
    assert told(tiny_path)["engine_kwargs"]["allowed_media_domains"] == ["none.invalid"]  # [] would be every host


def test_a_folder_is_found_from_any_working_directory(tiny_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_path)
    assert told(".")["model_loading_config"] == {"model_id": "demo", "model_source": tiny_path}


def test_a_run_is_refused_with_the_command_that_makes_a_model_of_it(tiny_path, tmp_path):
    run = lora_run(tmp_path, tiny_path, "run", 1)
    with pytest.raises(ConfigError, match=r"smolray export demo.*image\.max_tiles=3 image\.upscale=true"):
        told(run, "image.max_tiles=3", "image.upscale=true")
    with pytest.raises(ConfigError, match="it has none of its own"):
        told(run)


def test_without_keys_it_serves_this_machine_alone(tiny_path):
    assert "asks for no API key: add --no-key" in refused("serve", tiny_path, "--backend", "vllm")
    open_door = ("serve", tiny_path, "--backend", "vllm", "--no-key", "--host", "0.0.0.0")
    assert "would let everyone in" in refused(*open_door)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_missing_vllm_is_told_with_its_remedy(tiny_path):
    said = refused("serve", tiny_path, "--backend", "vllm", "--no-key")
    assert "environment of its own" in said and "pip install 'smolray[vllm]'" in said
