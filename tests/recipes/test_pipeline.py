"""A pipeline gives the losses and gradients of one process, for every method and partition, and any engine resumes its
checkpoints.
"""

import pytest
import torch
from safetensors.torch import load_file

from smolray.config import load_config
from smolray.data.local import LocalStream, local_plan
from smolray.precompute.local import local_sidecars
from tests.gloo import run_workers
from tests.offline import asked, picture, shard_row, untied
from tests.recipes.pipelines import leg, measure
from tests.shards import vqa_rows, write_shards

STEPS = 4
PIPELINE = "engine.name=pipeline"
LORA = ["lora={r: 4, groups: [text, vision, connector]}", "model.train=[]"]
METHODS = {
    "full": [],  # groups end to end; embedding and head are tied
    "frozen tower": ["model.train=[connector, text]"],
    "text alone": ["model.train=[text]"],
    "tower alone": ["model.train=[vision]"],
    "lora": LORA,
    "lora and checkpointing": [*LORA, "model.gradient_checkpointing=true"],
    "full and checkpointing": ["model.gradient_checkpointing=true"],
    "shared images in rows": ["data.packing=image"],
    "padded rows": ["data.packing=none"],
    "precomputed features": ["model.train=[connector, text]", "model.vision_features=precompute"],
    # the schedule wants 6
    "learning rates": ["optimizer.learning_rates={vision: 1e-4, connector: 2e-3}", "train.global_batch=5"],
    "gpipe": ["engine.schedule=gpipe", "train.global_batch=5"],
    "4 bit": ["lora={r: 4}", "model.train=[]", "model.load_in_4bit=true"],
    "8-bit Adam": ["optimizer.name=adamw_8bit"],
    "noise, beside whole modules": [
        "lora={r: 4, groups: [text, vision], init_lora_weights: olora, modules_to_save: [embed_tokens, connector]}",
        "model.train=[]",
        "train.neftune_noise_alpha=5",
    ],
}
DPO = {"dpo, adapters off": ["lora={r: 4}", "model.train=[]"], "dpo, precomputed": ["dpo.reference=precompute"]}
PARTITIONS = {
    "tower | text": "[4,5]",
    "in the tower": "[2,7]",
    "in the text": "[6,3]",
    "embeddings alone": "[1,8]",
    "head alone": "[8,1]",
}
LOSS = {"8-bit Adam": 1e-4}  # where codes round the other way
ALL = [*METHODS, "untied", *DPO]


@pytest.fixture(scope="module")
def data(recipe, pairs, tmp_path_factory):
    """name -> (shards, overrides).

    Rows of one image, of several, of split ones, and so much plain text that whole micro-batches have no image.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    rows = vqa_rows("train", 2)
    for i in range(5):
        images = [picture(60, 60, i), picture(150, 100, i)]
        rows.insert(3 * i, shard_row(images, *(asked(f"both? {n}", "yes", 2, name=f"two {i} {n}") for n in range(3))))
        rows.insert(3 * i, shard_row([], *(asked(f"{i} and {n}?", "so", 0, name=f"{i}+{n}") for n in range(3))))
    shards = write_shards(str(folder / "shards"), rows, rows_per_file=20)
    overrides = [*recipe[1], "image.longest_edge=128", "train.per_device_train_batch_size=3"]
    source = next(o for o in overrides if o.startswith("model.path=")).removeprefix("model.path=")
    untied(source, folder / "untied")
    made = {name: (shards, [*overrides, *method]) for name, method in METHODS.items()}
    made["untied"] = (shards, [*overrides, f"model.path={folder}/untied"])
    made |= {name: (pairs[0], [*pairs[1], *method]) for name, method in DPO.items()}
    for where, settings in made.values():
        local_sidecars(where, load_config(None, settings))
    return made


def jobs(data, names, *settings):
    return {name: (data[name][0], [*data[name][1], *settings], STEPS) for name in names}


def partitioned(data, name):
    """Under every partition."""
    shards, overrides = data[name]
    return {
        f"{name}, {partition}": (shards, [*overrides, PIPELINE, f"engine.partition={sizes}"], STEPS)
        for partition, sizes in PARTITIONS.items()
    }


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process under ZeRO-0: (records, folder of gradients)."""
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_workers(measure, 1, jobs(data, ALL), folder), folder


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two"))
    wanted = jobs(data, ALL, PIPELINE)
    wanted |= partitioned(data, "full")
    wanted["backwards"] = (data["full"][0], [*data["full"][1], PIPELINE, "engine.gpus=['1','0']"], STEPS)
    wanted["bf16"] = (data["full"][0], [*data["full"][1], PIPELINE, "model.dtype=bfloat16"], STEPS)
    return run_workers(measure, 2, wanted, folder), folder


@pytest.fixture(scope="module")
def three(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("three"))
    return run_workers(measure, 3, jobs(data, ALL, PIPELINE), folder), folder


@pytest.fixture(scope="module")
def four(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("four"))
    meshes = {f"{name}, 2 x 2": job for name, job in jobs(data, ALL, PIPELINE, "engine.pipeline_stages=2").items()}
    meshes["crosswise"] = (
        data["full"][0],
        [*data["full"][1], PIPELINE, "engine.pipeline_stages=2", "engine.gpus=['3','1','0','2']"],
        STEPS,
    )
    return run_workers(measure, 4, jobs(data, ALL, PIPELINE) | meshes, folder), folder


def assert_same(got, want, name, other):
    (records, folder), (wanted, whole) = got, want
    record, reference = records[name], wanted[other]
    for key in ("samples", "tokens"):
        assert record[key] == reference[key], f"{key} are not counted once"
    tolerance = LOSS.get(other, 1e-5)
    assert [loss for loss, _ in record["curve"]] == pytest.approx(
        [loss for loss, _ in reference["curve"]], abs=tolerance
    )
    assert [norm for _, norm in record["curve"]] == pytest.approx(
        [norm for _, norm in reference["curve"]], rel=10 * tolerance
    )
    gradients, expected = load_file(f"{folder}/{name}.safetensors"), load_file(f"{whole}/{other}.safetensors")
    assert gradients.keys() == expected.keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    worst = max((float((gradients[n] - expected[n]).norm() / norm), n) for n in expected)
    assert worst[0] <= 1e-6, worst
    for loss in record.get("whole", ()):
        assert loss == pytest.approx(reference["whole"][0], rel=1e-5), "the gathered model is not the trained one"


@pytest.mark.parametrize("name", ALL)
def test_two_stages_give_the_losses_and_gradients_of_one_process(alone, two, name):
    assert_same(two, alone, name, name)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_gives_the_losses_and_gradients_of_one_process(alone, two, partition):
    assert_same(two, alone, f"full, {partition}", "full")


@pytest.mark.slow
def test_every_partition_of_a_frozen_tower_gives_the_losses_and_gradients_of_one_process(alone, data, tmp_path):
    frozen = "text alone"
    found = run_workers(measure, 2, partitioned(data, frozen), str(tmp_path)), str(tmp_path)
    for partition in PARTITIONS:
        assert_same(found, alone, f"{frozen}, {partition}", frozen)


def test_any_order_of_workers_gives_the_same_losses(alone, two):
    assert_same(two, alone, "backwards", "full")


@pytest.mark.slow
def test_any_order_of_workers_in_two_pipelines_gives_the_same_losses(alone, four):
    assert_same(four, alone, "crosswise", "full")


def test_in_bf16_it_follows_fp32(alone, two):
    got, want = ([loss for loss, _ in records["curve"]] for records in (two[0]["bf16"], alone[0]["full"]))
    assert got == pytest.approx(want, rel=5e-2)


def test_the_reference_learns_and_has_micro_batches_without_images(alone, data):
    shards, overrides = data["full"]
    config = load_config(None, overrides)
    plan = local_plan(shards, config)
    tiles = [len(batch.pixel_values) for batch in LocalStream(shards, plan, range(min(len(plan), 3 * STEPS)), config)]
    assert 0 in tiles and len(set(tiles)) > 2
    for name in ("full", "lora", "text alone"):
        curve = alone[0][name]["curve"]
        assert curve[-1][0] < curve[0][0], f"{name} learns nothing: equal curves would show nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_three_stages_give_the_losses_and_gradients_of_one_process(alone, three, name):
    assert_same(three, alone, name, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_four_stages_give_the_losses_and_gradients_of_one_process(alone, four, name):
    assert_same(four, alone, name, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_pipelines_of_two_stages_give_the_losses_of_one_process(alone, four, name):
    assert_same(four, alone, f"{name}, 2 x 2", name)


@pytest.mark.slow
def test_a_run_resumes_exactly_under_other_stages_and_engines(alone, data, tmp_path):
    """A smaller number of workers each time, every checkpoint made by another engine."""
    shards, overrides = data["full"]
    legs = [(3, [PIPELINE]), (2, [PIPELINE]), (2, ["engine.stage=2"]), (1, ["engine.stage=0"]), (4, [PIPELINE])]
    curve = []
    for step, (workers, settings) in enumerate(legs, start=1):
        curve += run_workers(leg, workers, shards, [*overrides, *settings], step, str(tmp_path / "run"))
    want = run_workers(leg, 1, shards, overrides, len(legs), str(tmp_path / "whole"))
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in want], abs=1e-5)
    assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in want], rel=1e-4)
