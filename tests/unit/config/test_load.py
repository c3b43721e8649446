"""Every wrong setting is refused in one line that names the key, the value, what is allowed and the nearest valid
choice.
"""

import json
import re

import jsonschema
import pytest

from smolray.config import ConfigError, RunConfig, errors, load_config, to_yaml


def refusal(*overrides: str, path=None, base=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, base)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimzer.learning_rate=1", ["optimzer = ", "not a setting", "did you mean optimizer?"]),
        ("learning_rate=1", ["learning_rate = 1", "did you mean optimizer.learning_rate?"]),
        ("train.max_stepz=7", ["train.max_stepz = 7", "did you mean train.max_steps?", "num_train_epochs"]),
        ("data.columns.imagee=a", ["data.columns.imagee = 'a'", "did you mean data.columns.image?"]),
        ("method=simppo", ["method = 'simppo'", "'sft', 'dpo', 'simpo' or 'retrieval'", "nearest: simpo"]),
        ("simpo_gamma=1", ["simpo_gamma = 1", "did you mean simpo.simpo_gamma?"]),
        ("model.dtype=bf16", ["model.dtype = 'bf16'", "'float32', 'bfloat16' or 'float16'", "nearest: bfloat16"]),
        ("engine.stage=7", ["engine.stage = 7", "'auto', 0, 1, 2 or 3", "nearest: 3"]),
        ("engine=zerro", ["engine.name = 'zerro'", "nearest: zero"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate = -1", "greater than or equal to 0", "nearest: 0"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate = inf", "finite"]),
        ("lora.lora_dropout=1", ["lora.lora_dropout = 1", "nearest: just below 1"]),
        ("train.max_steps=1.5", ["train.max_steps = 1.5", "integer"]),
        ("train.max_steps=true", ["train.max_steps = True", "not allowed"]),
        ("resources.num_workers=abc", ["resources.num_workers = 'abc'", "a number, or [min, max]"]),
        ("resources.num_workers=[1]", ["resources.num_workers = [1]", "a number, or [min, max]"]),
        ("resources.num_workers=true", ["resources.num_workers = True"]),
        ("model.train=vision", ["model.train = 'vision'", "nearest: [vision]"]),
        ("model.train=[vision,textt]", ["model.train.1 = 'textt'", "nearest: text"]),
        ("name=My Run!", ["name = 'My Run!'", "nearest: my-run"]),
        ("lora=3", ["lora = 3", "lora_alpha"]),
        ("lora.rank=8", ["did you mean lora.r?"]),
        ("lora.alpha=8", ["did you mean lora.lora_alpha?"]),
        ("lr=1e-4", ["did you mean optimizer.learning_rate?"]),
        ("train.batch_size=4", ["did you mean train.per_device_train_batch_size?"]),
        ("train.epochs=3", ["did you mean train.num_train_epochs?"]),
        ("model.name=tiny", ["did you mean model.path?"]),
        ("num_gpus=2", ["did you mean resources.num_workers?"]),
        ("lora.target_modules=q_proj", ["expected a list", "nearest: [q_proj]"]),
        ("model.train=vison", ["of vision, connector, text", "nearest: [vision]"]),
        ("lora.groups=all", ["nearest: [vision, connector, text]"]),
        ("train.int=3", ["train.int = 3", "not a setting"]),
        ("seed=1e23", ["seed = '1e23'", "integer"]),
        ("seed=1.0e+23", ["seed = 1e+23", "integer"]),
        ("seed=4294967296", ["seed = 4294967296", "nearest: 4294967295"]),
        ("train.max_steps=99999999999999999999", ["train.max_steps = ", "below 2^63"]),
        ("engine.partition=[99999999999999999999]", ["engine.partition = ", "below 2^63"]),
        ("train.max_steps=.nan", ["train.max_steps = nan", "finite"]),
        ("optimizer.lr_scheduler_kwargs={num_cycles: .nan}", ["lr_scheduler_kwargs.num_cycles = nan"]),
        ("lora.r=999999999999", ["lora.r = 999999999999", "nearest: 65536"]),
        ("seed=", ["seed = None", "integer"]),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, told):
    message = refusal(override)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("override", "base", "found"),
    [
        ("data.validation=", {"data": {"validation": "val.parquet"}}, lambda c: c.data.validation == ""),
        ("model.revision=", {"model": {"revision": "abc"}}, lambda c: c.model.revision is None),
        ("model.train=", {"model": {"train": ["text"]}, "lora": {"r": 4}}, lambda c: c.model.train == ()),
        ("lora.ranks=", {"lora": {"ranks": {"text": 4}}}, lambda c: c.lora.ranks == {}),
        ("lora=", {"lora": {"r": 4}}, lambda c: c.lora is None),
        ("train.global_batch=", {"train": {"global_batch": 8}}, lambda c: c.train.global_batch is None),
    ],
)
def test_an_empty_override_empties_the_key(override, base, found):
    assert found(load_config(None, [override], base))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.load_in_4bit=true", "model.train=[]", "engine.stage=3", "lora.r=4"],
            ["engine.stage = 3", "nearest: engine.stage=2"],
        ),
        (["model.load_in_4bit=true", "model.load_in_8bit=true", "lora.r=4", "model.train=[]"], ["both true"]),
        (["model.load_in_8bit=true", "model.train=[]"], ["lora = null", "nearest: lora={r: 8}"]),
        (["model.load_in_4bit=true", "lora.r=4"], ["nearest: model.train=[]"]),
        (["engine.stage=0", "model.dtype=float16"], ["model.dtype = float16", "nearest: engine.stage=1"]),
        (["engine.offload_param=cpu"], ["needs engine.stage = 3, found 0"]),
        (
            ["engine.stage=0", "model.dtype=float32", "engine.offload_optimizer=cpu"],
            ["engine.offload_optimizer = cpu", "engine.stage=1"],
        ),
        (["model.dtype=float16", "resources.use_gpu=no"], ["model.dtype = float16", "nearest: bfloat16"]),
        (["model.train=[]"], ["nothing would be trained"]),
        (["resources.num_workers=[1,4]"], ["train.global_batch is not set", "nearest: train.global_batch=4"]),
        (["resources.num_workers=[4,2]", "train.global_batch=4"], ["[4, 2]", "1 <= min <= max"]),
        (
            ["resources.num_workers=2", "train.gradient_accumulation_steps=2", "train.global_batch=5"],
            ["train.global_batch = 5", "= 4"],
        ),
        (
            ["train.load_balancing=speed", "engine.stage=3"],
            ["train.load_balancing = speed", "wait for the slowest GPU", "nearest: train.load_balancing=equal"],
        ),
        (["engine.gpus=[a,b]"], ["engine.gpus", "engine = zero", "nearest: engine=pipeline"]),
        (
            ["resources.num_workers=4", "train.global_batch=3"],
            ["train.global_batch = 3", "below the 4 workers", "nearest: train.global_batch=4"],
        ),
        (
            ["train.micro_batch_tokens=100", "data.max_length=2048"],
            ["train.micro_batch_tokens = 100", "data.max_length = 2048"],
        ),
    ],
)
def test_an_impossible_combination_is_refused(overrides, told):
    message = refusal(*overrides)
    for part in told:
        assert part in message


def test_what_other_trainers_call_a_setting_is_a_setting_here():
    known = set(errors.ELSEWHERE.values()) | set(errors.ELSEWHERE_IN.values())
    assert not [key for key in known if key.split(".")[-1] not in errors._fields_at(RunConfig, key.split(".")[:-1])]
    wrong = [name for name in errors.ELSEWHERE if name in errors._fields_at(RunConfig, [])]
    assert not wrong, "these are settings themselves"


def test_all_linear_is_accepted_as_peft_writes_it():
    for written in ("all-linear", "[all-linear]"):
        lora = load_config(None, [f"lora.target_modules={written}"]).lora
        assert lora.adapts("model.text_model.layers.0.self_attn.q_proj") and lora.adapts("fc1")
        assert not lora.adapts("lm_head")
    lora = load_config(None, ["lora.target_modules=[q_proj]"]).lora
    assert lora.adapts("self_attn.q_proj") and lora.adapts("q_proj") and not lora.adapts("xq_proj")


def test_all_faults_are_reported_at_once():
    assert len(refusal("seed=-1", "model.dtype=int4", "nope=1").splitlines()) == 3
    assert len(refusal("engine.stage=0", "engine.offload_param=cpu", "engine.offload_optimizer=cpu").splitlines()) == 2


@pytest.mark.parametrize("override", ["novalue", "a b=1", "=3", "a..b=1", "train.max_steps=[1"])
def test_an_argument_that_is_not_an_override_is_refused(override):
    assert override.split("=")[0] in refusal(override)


def test_overrides_override_the_file_and_the_file_the_base(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 2\noptimizer:\n  learning_rate: 1e-3\n")
    base = {"seed": 1, "method": "sft", "optimizer": {"learning_rate": 5.0, "weight_decay": 0.5}}
    config = load_config(str(file), ["seed=3"], base)
    assert (config.seed, config.optimizer.learning_rate, config.optimizer.weight_decay) == (3, 1e-3, 0.5)
    assert base["seed"] == 1, "the caller's dictionary stays as it was"


def test_an_engine_may_be_one_word_and_still_take_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("engine: zero\n")
    assert load_config(str(file), ["engine.stage=1"]).engine.stage == 1
    assert "zerro" in refusal("engine.stage=1", base={"engine": "zerro"})


def test_yaml_yes_and_no_are_read_as_words_where_they_are_choices(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("resources: {use_gpu: no}\n")
    assert load_config(str(file)).resources.use_gpu == "no"
    assert load_config(None, ["resources.use_gpu=yes"]).resources.use_gpu == "yes"


def test_text_needs_quotes_in_yaml_and_none_in_an_override():
    config = load_config(None, ["name=2024", "model.revision=1234567", "data.prompt=Answer: yes or [no"])
    assert (config.name, config.model.revision, config.data.prompt) == ("2024", "1234567", "Answer: yes or [no")
    assert load_config(None, ["data.validation='007'", "data.revision=null"]).data.validation == "007"
    assert 'nearest: "3"' in refusal(base={"model": {"path": 3}})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\x00\x01"])
def test_a_file_without_settings_is_refused_by_its_name(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert str(file) in refusal(path=str(file))
    assert "absent.yaml" in refusal(path=str(tmp_path / "absent.yaml"))


def test_the_resolved_yaml_reads_back_to_the_same_run(tmp_path):
    overrides = [
        "lora.r=4",
        "resources.num_workers=[1,3]",
        "train.global_batch=6",
        "resources.label_selector={ray.io/type: A10G}",
    ]
    config = load_config(None, [*overrides, "data.prompt=Wähle: ja, nein"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


def test_the_schema_is_valid_and_accepts_what_the_models_accept():
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(load_config(None, ["lora.r=4"]).model_dump(mode="json")))
    assert list(validator.iter_errors({"engine": {"stage": 9}}))
    assert list(validator.iter_errors({"nope": 1}))


@pytest.mark.parametrize(
    ("overrides", "global_batch"),
    [
        ([], 1),
        ([], 1),
        (["resources.num_workers=auto", "train.gradient_accumulation_steps=4"], 4),
        (["resources.num_workers=3"], 3),
        (["resources.num_workers=3", "train.gradient_accumulation_steps=2"], 6),
        (["resources.num_workers=[1,4]", "train.global_batch=6"], 6),
        (["resources.num_workers=2", "train.global_batch=3"], 3),
        (["resources.num_workers=3", "engine=pipeline"], 12),
        (["resources.num_workers=3", "engine=pipeline", "train.gradient_accumulation_steps=2"], 6),
        (["resources.num_workers=[1,3]", "engine=auto"], 3),
    ],
)
def test_the_global_batch_is_set_or_follows_from_the_workers(overrides, global_batch):
    assert load_config(None, overrides).global_batch == global_batch


def test_replace_sets_dotted_keys_and_leaves_the_rest():
    config = load_config(None, ["seed=3", "engine.stage=1"])
    changed = config.replace({"engine.offload_optimizer": "cpu", "lora.r": 4, "data.columns.id": "key", "search": None})
    assert changed == load_config(
        None, ["seed=3", "engine={stage: 1, offload_optimizer: cpu}", "lora={r: 4}", "data.columns={id: key}"]
    )
    assert config == load_config(None, ["seed=3", "engine.stage=1"]), "the original is not changed"
    assert config.replace({}) == config and config.data.replace({"prompt": "Why?"}).prompt == "Why?"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"engine.stage": 7}, "engine.stage = 7: input should be 'auto', 0, 1, 2 or 3; nearest: 3"),
        ({"engine.stge": 3}, "engine.stge = 3: not a setting"),
        ({"train.max_steps": True}, "train.max_steps = True"),
    ],
)
def test_replace_refuses_a_wrong_value_by_its_key(settings, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config().replace(settings)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("train.deal", "train.load_balancing", "equal"),
        ("engine.cut", "engine.partition", "[2,7]"),
        ("engine.cards", "engine.gpus", "[a,b]"),
    ],
)
def test_a_key_is_read_by_its_earlier_name(old, new, value, tmp_path):
    section, key = old.split(".")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"{section}: {{name: pipeline, {key}: {value}}}" if section == "engine" else f"{section}: {{{key}: {value}}}"
    )
    now = load_config(None, ["engine.name=pipeline", f"{new}={value}"])
    assert load_config(None, ["engine.name=pipeline", f"{old}={value}"]) == now
    assert load_config(str(file), ["engine.name=pipeline"]) == now
    with pytest.raises(ConfigError, match=f"{old} is the earlier name of {new}, and both are given"):
        load_config(None, [], base={section: {key: 1, new.split(".")[1]: 1}})


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        ([], 0),
        (["resources.num_workers=2", "train.global_batch=2"], 2),
        (["resources.num_workers=[1, 2]", "train.global_batch=2"], 2),
        (["model.dtype=float16"], 2),
        (["engine.offload_optimizer=cpu"], 2),
        (["engine.stage=1"], 1),
    ],
)
def test_zero_shards_nothing_on_one_worker_unless_it_is_told_to(overrides, stage):
    assert load_config(None, overrides).zero_stage == stage
