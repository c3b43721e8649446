"""Contrastive training: a step's pairs are compared with each other whatever micro-batches and workers they lie in."""

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from smolray import storage
from smolray.config import load_config
from smolray.data.local import LocalStream, local_plan
from smolray.evaluate.retrieval import search_report
from smolray.inference.predictor import find_model
from smolray.model.load import load_model
from smolray.model.tiny import build_model
from smolray.model.trained import trained_model
from smolray.objectives.contrastive import embeddings, info_nce
from smolray.run.checkpoint import Progress
from smolray.run.state import canonical_name
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers
from tests.offline import untied
from tests.recipes.curves import curve, curves, first_gradients
from tests.shards import captioned, vqa_rows, write_shards

STEPS = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(shard folder, overrides): captions of easy-vqa's images, seven pairs in a micro-batch, three of those in a
    step.
    """
    folder = tmp_path_factory.mktemp("contrastive")
    rows = captioned(vqa_rows("train", 150))
    shards = write_shards(str(folder / "shards"), rows)
    model = build_model("tiny", [m.text for row in rows for m in row.conversations[0].messages], folder / "model")
    return shards, [
        "method=retrieval",
        f"model.path={model}",
        "model.dtype=float32",
        "train.per_device_train_batch_size=7",
        "train.global_batch=3",
        "optimizer.learning_rate=1e-3",
        "optimizer.lr_scheduler_type=constant",
        "engine.stage=0",
    ]


def test_pairs_of_one_image_or_one_text_are_no_negatives():
    rng = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 8, generator=rng), dim=-1) for _ in range(2))
    keys = torch.tensor([[1, 10], [1, 11], [2, 12], [3, 10]])  # 0 and 1 share their image, 0 and 3 their text
    losses, _ = info_nce(images, texts, keys, 0.1)
    scores = (texts @ images.T / 0.1).exp()
    for n, negatives in enumerate([(2,), (2, 3), (0, 1, 3), (1, 2)]):
        of_text = -(scores[n, n] / (scores[n, n] + sum(scores[n, m] for m in negatives))).log()
        of_image = -(scores[n, n] / (scores[n, n] + sum(scores[m, n] for m in negatives))).log()
        assert float(losses[n]) == pytest.approx(float((of_text + of_image) / 2), rel=1e-5)


PACKINGS = ("full", "image", "none")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """(folder of the gradients of the first step by packing, its loss by packing) of one worker."""
    shards, overrides = pictures
    folder = tmp_path_factory.mktemp("gradients")
    jobs = {packing: [*overrides, f"data.packing={packing}"] for packing in PACKINGS}
    run_workers(first_gradients, 1, shards, jobs, str(folder))
    found = run_workers(curves, 1, shards, {packing: (settings, 1) for packing, settings in jobs.items()})
    return folder, {packing: curve[0][0] for packing, curve in found.items()}


@pytest.mark.parametrize("packing", PACKINGS)
def test_loss_and_gradients_are_those_of_all_pairs_of_the_step_at_once(pictures, trained, packing):
    shards, overrides = pictures
    config = load_config(None, [*overrides, f"data.packing={packing}"])
    model = load_model(config.model).train()
    batches = list(LocalStream(shards, local_plan(shards, config), range(3), config))
    places = [torch.tensor(batch.meta["pairs"]) for batch in batches]
    found = [embeddings(model, batch) for batch in batches]
    images, texts = (torch.cat([e[p[:, side]] for e, p in zip(found, places, strict=True)]) for side in (0, 1))
    loss = info_nce(images, texts, torch.cat([p[:, 2:] for p in places]), config.retrieval.temperature)[0].mean()
    loss.backward()
    wanted = {canonical_name(name): p.grad for name, p in model.named_parameters()}
    folder, losses = trained
    got = load_file(folder / f"{packing}.safetensors")
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert got.keys() == wanted.keys()
    assert max(float((got[name] - wanted[name]).norm() / norm) for name in got) < 1e-5
    assert losses[packing] == pytest.approx(float(loss), rel=1e-6)


def saved_curve(shards: str, overrides: list[str], run_dir: str) -> list[float]:
    return [loss for loss, _ in curve(shards, overrides, 3, run_dir)]


def test_a_model_with_a_head_of_its_own_trains_in_full_and_is_read_back(pictures, tmp_path):
    """Nothing of the loss goes through the head, which published models do not tie to the token embedding."""
    shards, overrides = pictures
    overrides = [*overrides, f"model.path={untied(load_config(None, overrides).model.path, tmp_path / 'untied')}"]
    losses = run_workers(saved_curve, 1, shards, overrides, str(tmp_path / "run"))
    assert losses[-1] < losses[0]
    config = load_config(None, overrides)
    storage.write_bytes(f"{tmp_path}/run/config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    source = find_model("run", str(tmp_path))
    before, after = load_model(config.model), trained_model(source.config, source.checkpoint)
    changed = {name.split(".")[0] for name, p in after.named_parameters() if not p.equal(before.get_parameter(name))}
    assert changed == {"model"}, "all but lm_head"


LORA = ["lora={r: 4, lora_dropout: 0.1, groups: [text, vision]}", "model.train=[]"]


@pytest.fixture(scope="module")
def alone(pictures):
    shards, overrides = pictures
    return run_workers(curves, 1, shards, {"full": (overrides, STEPS), "lora": ([*overrides, *LORA], STEPS)})


def test_workers_and_stages_give_one_curve(pictures, alone):
    """Also LoRA with dropout: both passes of a step meet the same noise.

    Two workers share three micro-batches unevenly.
    """
    shards, overrides = pictures
    jobs = {f"full {s}": ([*overrides, f"engine.stage={s}"], STEPS) for s in (0, 2, 3)} | {
        "lora 2": ([*overrides, *LORA, "engine.stage=2"], STEPS)
    }
    for name, found in run_workers(curves, 2, shards, jobs).items():
        want = alone[name.split()[0]]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in want], abs=1e-5), name
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in want], rel=1e-4), name
    assert alone["full"][-1][0] < alone["full"][0][0]


def halves(shards: str, overrides: list[str], stages: list[int], root: str, resume: bool) -> list[list[float]]:
    """The losses of the first half, saved, or with `resume` of the second one, for each stage."""
    steps = STEPS if resume else STEPS // 2
    return [
        [loss for loss, _ in curve(shards, [*overrides, f"engine.stage={stage}"], steps, f"{root}/{number}", resume)]
        for number, stage in enumerate(stages)
    ]


@pytest.mark.slow
def test_a_run_saved_under_one_stage_resumes_under_another(pictures, alone, tmp_path):
    shards, overrides = pictures
    begun = run_workers(halves, 2, shards, overrides, [2, 3, 0], str(tmp_path), False)
    rest = run_workers(halves, 1, shards, overrides, [2, 0, 1], str(tmp_path), True)
    for first, second in zip(begun, rest, strict=True):
        assert first + second == pytest.approx([loss for loss, _ in alone["full"]], abs=1e-5)


def searched(shards: str, overrides: list[str]) -> list[dict]:
    """The predictions of an untrained model, each worker embedding every so-manieth micro-batch.

    Collective; from the last worker's report.
    """
    config = load_config(None, overrides)
    plan = local_plan(shards, config)
    mine = range(len(plan))[dist.get_rank() :: dist.get_world_size()]
    report = search_report(
        load_model(config.model).eval(), LocalStream(shards, plan, mine, config), torch.device("cpu")
    )
    told = [report.predictions]
    dist.broadcast_object_list(told, src=dist.get_world_size() - 1)
    return told[0]


def test_a_search_on_two_workers_finds_what_one_finds_and_tells_both(pictures):
    one, two = (run_workers(searched, world, *pictures) for world in (1, 2))
    assert len(one) > 10 and [(p["id"], p["question"], p["answers"]) for p in one] == [
        (p["id"], p["question"], p["answers"]) for p in two
    ]


def train_and_search(shards: str, tested: str, overrides: list[str]) -> list[float]:
    """Mean average precision of a search among unseen images by their captions, before and after training.

    Collective.
    """
    config = load_config(None, overrides)
    engine = build_engine(config)

    def precision() -> float:
        engine.model.eval()
        plan = local_plan(tested, config)
        report = search_report(engine.model, LocalStream(tested, plan, range(len(plan)), config), engine.device)
        engine.model.train()
        return report.metrics["mean_average_precision"]["overall"]["value"]

    before = precision()
    plans = [local_plan(shards, config, epoch) for epoch in range(config.train.num_train_epochs)]
    TrainLoop(config, engine, plans, lambda plan, numbers: LocalStream(shards, plan, numbers, config), Progress()).run()
    return [before, precision()]


@pytest.mark.slow
def test_pictures_are_found_by_the_24_captions(tmp_path):
    rows, tested = captioned(vqa_rows("train", 2500)), captioned(vqa_rows("test", 300))
    shards, unseen = write_shards(f"{tmp_path}/train", rows), write_shards(f"{tmp_path}/tested", tested)
    model = build_model(
        "tiny", sorted({m.text for row in rows for m in row.conversations[0].messages}), tmp_path / "model"
    )
    before, after = run_workers(
        train_and_search,
        1,
        shards,
        unseen,
        [
            "method=retrieval",
            f"model.path={model}",
            "model.dtype=float32",
            "engine.stage=0",
            "train.per_device_train_batch_size=64",
            "train.num_train_epochs=10",
            "optimizer.learning_rate=1e-3",
            "optimizer.warmup_ratio=0.1",
        ],
    )
    print(
        f"mean average precision over {len({r.conversations[0].answers[0] for r in tested})} captions, {len(tested)} "
        f"pictures: {before:.3f} -> {after:.3f}"
    )
    assert before < 0.3
    assert after > 0.8
