"""Two nodes on a slow link, full fine-tuning: the planner predicts the time of each strategy, and ranks the fastest
first.
"""

import json
import statistics

import pytest

from smolray.model.tiny import build_model
from tests.nodes.conftest import ROOT
from tests.nodes.lan import VENV, lan
from tests.shards import vqa_rows, write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, WARM_UP = 5, 2
ENGINES = {"pipeline": ["engine=pipeline"], "zero-1": ["engine.stage=1"], "zero-3": ["engine.stage=3"]}


@pytest.fixture(scope="module")
def run(needs_boxes, tmp_path_factory):
    """(shards, overrides) of a run of 30 M parameters."""
    folder = tmp_path_factory.mktemp("slow")
    rows = vqa_rows("train", 200)
    shards = write_shards(str(folder / "shards"), rows)
    texts = [f"{c.messages[0].text}\n {c.messages[1].text}" for row in rows for c in row.conversations]
    model = build_model("random-30m", texts, folder / "model")
    return shards, [
        f"model.path={model}",
        "model.dtype=float32",
        "train.per_device_train_batch_size=8",
        "train.global_batch=8",
        "data.max_questions_per_image=4",
        "resources.num_workers=2",
        f"train.max_steps={STEPS}",
    ]


@pytest.fixture(scope="module", params=["1gbit", "100mbit"])
def measured(request, run, tmp_path_factory):
    """What was predicted and what was measured of each engine."""
    (shards, overrides), folder = run, tmp_path_factory.mktemp(request.param)
    with lan(folder) as nodes:
        pair = nodes.add("den", "loft", PYTHONPATH=str(ROOT))
        for node in pair:
            node.rate(request.param)
        out, jobs = folder / "found.json", json.dumps({name: [*overrides, *engine] for name, engine in ENGINES.items()})
        workers = [
            node.start(
                str(VENV / "python"),
                "-m",
                "tests.nodes.slow_link",
                str(rank),
                pair[0].ip,
                node.ip,
                shards,
                str(out),
                jobs,
                log="worker.log",
            )
            for rank, node in enumerate(pair)
        ]
        for worker in workers:
            assert worker.wait(800) == 0, (pair[0].folder / "srv/worker.log").read_text()[-3000:]
        found = json.loads(out.read_text())
    for name in ENGINES:
        found[name]["measured"] = statistics.median(found[name]["seconds"][WARM_UP:])
        print(request.param, name, found[name], flush=True)
    print(found["survey"], flush=True)
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_takes_what_the_planner_predicts(measured, name):
    assert measured[name]["predicted"] == pytest.approx(measured[name]["measured"], rel=0.25)


def test_what_the_planner_ranks_first_is_the_fastest(measured):
    assert min(ENGINES, key=lambda name: measured[name]["predicted"]) == min(
        ENGINES, key=lambda name: measured[name]["measured"]
    )
