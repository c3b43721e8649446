"""Values of sidecars train like values that are computed in every step, over epochs, engines and workers."""

import pytest

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.data.shards import write_shards
from smolray.precompute.local import local_sidecars
from smolray.train.balance import MicroBatchBalancer
from tests.gloo import run_workers
from tests.offline import asked, picture, shard_row
from tests.recipes.curves import curves, step_metrics
from tests.shards import vqa_rows

WORLD, STEPS = 2, 5
FRONTS = {
    "tower and connector": ["model.train=[text]"],
    "tower": ["model.train=[text,connector]"],
    "lora": ["model.train=[]", "lora={r: 4, groups: [text, connector]}"],
}
STAGES = [("tower and connector", 3), ("lora", 2)]
OTHERS = [("tower and connector", 0), ("tower", 2), ("tower", 3)]
BF16 = {
    f"{front}, bf16": [*FRONTS[front], "engine.stage=2", "model.dtype=bfloat16"]
    for front in ("tower and connector", "tower")
}
ONCE = "model.vision_features=precompute"


def under(stages):
    return {f"{front}, ZeRO-{stage}": [*FRONTS[front], f"engine.stage={stage}"] for front, stage in stages}


@pytest.fixture(scope="module")
def mixed(recipe, tmp_path_factory):
    """Easy-vqa, rows of several and of split images, and so much plain text that whole micro-batches have no image."""
    rows = vqa_rows("train", 6)
    for i in range(4):
        rows.append(shard_row([picture(60, 60, i), picture(150, 100, i)], asked("both?", "yes", 2, name=f"two {i}")))
        rows += [shard_row([], asked(f"{i} and {n}?", "so", 0, name=f"{i}+{n}")) for n in range(6)]
    shards = write_shards(str(tmp_path_factory.mktemp("mixed") / "shards"), rows[::2] + rows[1::2], rows_per_file=20)
    overrides = [
        *recipe[1],
        "image.longest_edge=128",
        "train.num_train_epochs=3",
        "train.per_device_train_batch_size=3",
        "train.global_batch=5",
    ]
    for settings in (*FRONTS.values(), *BF16.values()):
        local_sidecars(shards, load_config(None, [*overrides, *settings, ONCE]))
    return shards, overrides


def trained(mixed, jobs):
    """Curves of three epochs on two workers by (name, computed once)."""
    shards, overrides = mixed
    twice = {
        f"{name} {once}": ([*overrides, *settings, *[ONCE] * once], -1)
        for name, settings in jobs.items()
        for once in (0, 1)
    }
    return run_workers(curves, WORLD, shards, twice)


@pytest.fixture(scope="module")
def in_fp32(mixed):
    return trained(mixed, under(STAGES))


@pytest.fixture(scope="module")
def under_others(mixed):
    return trained(mixed, under(OTHERS))


@pytest.fixture(scope="module")
def in_bf16(mixed):
    return trained(mixed, BF16)


def assert_same_curve(found, name):
    want, got = found[f"{name} 0"], found[f"{name} 1"]
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in want], abs=1e-6)
    assert [norm for _, norm in got] == pytest.approx([norm for _, norm in want], rel=1e-5)
    assert want[-1][0] < 0.9 * want[0][0] or name.startswith("lora"), (
        "it learns nothing: equal curves would show nothing"
    )


@pytest.mark.parametrize("name", under(STAGES))
def test_precomputed_features_train_like_computed_ones_for_three_epochs(in_fp32, name):
    assert_same_curve(in_fp32, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", under(OTHERS))
def test_they_do_under_other_stages_too(under_others, name):
    assert_same_curve(under_others, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BF16)
def test_in_bf16_they_differ_by_its_rounding(in_bf16, name):
    assert [loss for loss, _ in in_bf16[f"{name} 1"]] == pytest.approx(
        [loss for loss, _ in in_bf16[f"{name} 0"]], rel=2e-2
    )


def test_one_worker_has_only_text_while_the_other_has_images(mixed):
    """ZeRO-3's collectives would wait for ever if the two ran other modules."""
    shards, overrides = mixed
    config, pairs = load_config(None, overrides), set()
    for plan in (local_plan(shards, config, epoch) for epoch in range(3)):
        tiles = plan.index["tiles"].to_numpy()[plan.index_rows]
        runs = zip(plan.group_start[plan.batch_start[:-1]], plan.group_start[plan.batch_start[1:]], strict=True)
        has_image = [bool(tiles[first:last].any()) for first, last in runs]
        for start in range(0, len(plan), config.global_batch):
            step = range(start, min(start + config.global_batch, len(plan)))
            pairs |= {
                (has_image[a], has_image[b])
                for a, b in zip(
                    MicroBatchBalancer(0, WORLD).own(step), MicroBatchBalancer(1, WORLD).own(step), strict=False
                )
            }
    assert {(True, False), (False, True)} <= pairs


REFERENCES = {
    "copy": ["engine.stage=0"],
    "adapter": ["lora={r: 4}", "model.train=[]", "optimizer.learning_rate=1e-2", "engine.stage=2"],
    "features": ["model.train=[text]", "engine.stage=0", ONCE],
}


@pytest.fixture(scope="module")
def compared(pairs):
    shards, overrides = pairs
    jobs = {
        f"{name} {reference}": [*overrides, *settings, f"dpo.reference={reference}"]
        for name, settings in REFERENCES.items()
        for reference in ("auto", "precompute")
    }
    # where a copy could not be sharded
    jobs["ZeRO-3 precompute"] = [*overrides, "engine.stage=3", "dpo.reference=precompute"]
    for settings in jobs.values():
        local_sidecars(shards, load_config(None, settings))
    return run_workers(step_metrics, WORLD, shards, jobs, STEPS)


@pytest.mark.parametrize(
    ("name", "other"), [*((n, f"{n} precompute") for n in REFERENCES), ("copy", "ZeRO-3 precompute")]
)
def test_logps_of_a_sidecar_equal_those_computed_in_every_step(compared, name, other):
    want, got = compared[f"{name} auto"], compared[other]
    assert len(want) == len(got) == STEPS and want[-1]["rewards/margins"] > 0.01
    tolerance = 1e-5 if "ZeRO" in other else 1e-6
    for a, b in zip(got, want, strict=True):
        for metric in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert a[metric] == pytest.approx(b[metric], rel=tolerance, abs=tolerance), metric
