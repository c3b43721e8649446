"""lmms-eval's OpenAI client scores easy-VQA through `smolray serve` as `smolray evaluate` does, answer by answer."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray.config import load_config
from smolray.data.reader import ShardReader
from smolray.run.predictions import prediction_steps, read_predictions
from tests.own_environment import environment_of, own_python, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
QUESTIONS = 200
TASK = """
task: easyvqa
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/asked.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
VISUAL = """
import io
from PIL import Image


def visual(row):
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, easy_vqa):
    """The folder of `runs/small`, a run that has learned some answers, and what `smolray evaluate` says of it."""
    made = tmp_path_factory.mktemp("lmms")
    settings = ["name=small", "resources.num_workers=1", "train.max_steps=350"]
    settings += [f"data.train={easy_vqa}/train.parquet", f"data.validation={easy_vqa}/test.parquet"]
    settings += [f"evaluate.max_samples={QUESTIONS}"]
    for words in (["train", "--config", "demo", *settings], ["evaluate", "small"]):
        command = [sys.executable, "-m", "smolray", *words]
        done = subprocess.run(command, cwd=made, env=environment_of(sys.executable), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return made


def evaluated(folder):
    """The predictions of `smolray evaluate` by question."""
    run = f"{folder}/runs/small"
    return {one["id"]: one for one in read_predictions(run, prediction_steps(run)[-1])}


def write_task(folder):
    """The same questions as a task of lmms-eval; returns their ids in order."""
    rows = [
        {
            "image": {"bytes": row.images[0], "path": None},
            "question": conversation.messages[0].text,
            "answer": conversation.answers[0],
            "id": conversation.id,
        }
        for row in ShardReader.open(load_config(f"{folder}/runs/small/config.yaml").data.validation).rows()
        for conversation in row.conversations
    ][:QUESTIONS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "asked.parquet")
    (folder / "task").mkdir()
    (folder / "task" / "easyvqa.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    (folder / "task" / "utils.py").write_text(VISUAL)
    return [row["id"] for row in rows]


def test_its_openai_client_gets_the_answers_and_the_accuracy_of_smolray_evaluate(folder):
    python = own_python("lmms-eval")
    want, ids = evaluated(folder), write_task(folder)
    assert len(want) == QUESTIONS and set(want) == set(ids)
    assert len({one["prediction"] for one in want.values()}) > 2, "the answers do not vary: this would show nothing"

    with served(sys.executable, folder, "small") as address:
        model = f"model_version=small,base_url={address}/v1,api_key=none,num_concurrent=16,timeout=600"
        command = [python, "-m", "lmms_eval", "eval", "--model", "openai", "--model_args", model, "--batch_size", "1"]
        command += ["--tasks", "easyvqa", "--include_path", folder / "task", "--log_samples"]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        done = subprocess.run(
            [*command, "--output_path", folder / "out"],
            cwd=folder,
            env=environment_of(python, **offline),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    [samples] = (folder / "out").glob("*/*_samples_easyvqa.jsonl")
    said = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {ids[one["doc_id"]]: one["filtered_resps"].strip() for one in said}
    assert answers == {name: one["prediction"].strip() for name, one in want.items()}
    [results] = (folder / "out").glob("*/*_results.json")
    score = json.loads(results.read_text())["results"]["easyvqa"]["exact_match,none"]
    assert score == pytest.approx(sum(one["correct"] for one in want.values()) / QUESTIONS)
