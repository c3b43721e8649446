"""`smolray generate`: a run, its export and plain transformers say the same; sampling is seeded by the question; files
are written whole.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from typer.testing import CliRunner

from smolray.cli import app as cli
from smolray.config import ConfigError, RunConfig
from smolray.export import export_run
from smolray.inference import generate
from smolray.inference.job import run_locally
from smolray.inference.predictor import Decoding, find_model
from smolray.inference.questions import PromptSettings, find_question_tasks
from smolray.model.sampling import Sampler, probabilities
from tests.offline import picture
from tests.shards import vqa_rows, write_shards
from tests.unit.test_export import write_run

pytestmark = pytest.mark.seconds

PROMPTS = ("what is it?", "what colour is it? Answer\nin two lines.", "Describe the image.")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_path):
    return exported_run(tmp_path_factory.mktemp("runs"), tiny_path)


def exported_run(folder, path):
    """A run with LoRA on top of fully trained weights, and its export."""
    shards = write_shards(str(folder / "shards"), vqa_rows("train", 12))
    model = {"path": path, "dtype": "float32", "train": ["connector"], "vision_features": "compute"}
    config = RunConfig(
        name="my-run",
        storage=str(folder),
        model=model,
        lora={"r": 4, "lora_alpha": 16},
        data={"train": shards, "max_length": 1024, "format": "parquet", "columns": {"question": "q"}},
    )
    export_run(write_run(folder, config))
    return folder / "my-run"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate([(64, 64), (40, 60), (64, 64), (50, 30)]):
        (folder / f"{number}.png").write_bytes(picture(width, height, number))
    (folder / "2.png").write_bytes(b"broken")
    return folder


def asked(name, photos, decoding, batch_size=100, prompts=PROMPTS, storage="runs", settings=()):
    """The rows for all photos, decoded in this process."""
    source = find_model(str(name), str(storage), settings)
    prompt_settings = PromptSettings(source.config.data, prompts)
    question_tasks = find_question_tasks(str(photos), prompt_settings, batch_size)
    job = generate.answering_job(source, question_tasks, prompt_settings, decoding, batch_size)
    return [row for table in run_locally(job) for row in table.to_pylist()]


GREEDY = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def greedy(run, photos):
    return asked("my-run", photos, GREEDY, storage=run.parent)


def test_answers_are_those_of_transformers_generate_on_the_export(run, photos, greedy):
    want = transformers_answers(run / "export", photos)
    assert [row["text"] for row in greedy if not row["error"]] == want
    assert len(set(want)) > 3, "the answers do not vary: this test would show nothing"


def test_answers_of_a_published_model_are_those_of_transformers_generate(published_path, photos, tmp_path):
    run = exported_run(tmp_path, published_path)
    want = transformers_answers(run / "export", photos)
    assert [row["text"] for row in asked(run, photos, GREEDY) if not row["error"]] == want
    assert len(set(want)) > 3, "the answers do not vary: this test would show nothing"


def transformers_answers(export, photos):
    """What plain transformers say of each photo to each of PROMPTS."""
    model, processor = AutoModelForImageTextToText.from_pretrained(export).eval(), AutoProcessor.from_pretrained(export)
    want = []
    for photo in sorted(photos.iterdir()):
        for prompt in PROMPTS if photo.name != "2.png" else ():
            message = {
                "role": "user",
                "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": prompt}],
            }
            inputs = processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            want.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return want


def test_run_name_folder_and_export_answer_alike_in_any_batch(run, photos, greedy):
    assert asked(run, photos, GREEDY) == greedy
    assert asked(run / "export", photos, GREEDY, batch_size=2) == greedy
    assert asked("my-run", photos, GREEDY, batch_size=1, storage=run.parent) == greedy


def test_each_image_has_a_row_for_each_prompt_and_a_broken_one_an_error(photos, greedy):
    broken = [row for row in greedy if row["error"]]
    assert [row["id"] for row in greedy] == [f"{n}.png/{k}" for n in (0, 1) for k in (1, 2, 3)] + ["2.png"] + [
        f"3.png/{k}" for k in (1, 2, 3)
    ]
    assert [row["prompt"] for row in greedy[:3]] == list(PROMPTS) and greedy[0]["path"] == str(photos / "0.png")
    assert (
        len(broken) == 1
        and broken[0]["id"] == "2.png"
        and broken[0]["text"] is None
        and broken[0]["error"].startswith("corrupt_image: ")
    )


def test_a_sampled_answer_depends_on_seed_and_question_alone(run, photos, greedy):
    how = Decoding(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    rows = asked(run, photos, how)
    assert asked(run, photos, how, batch_size=2) == rows
    alone = asked(run, photos / "3.png", how)
    assert alone == rows[-3:]
    assert asked(run, photos, Decoding(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=4)) != rows != greedy
    assert asked(run, photos, Decoding(max_new_tokens=12, temperature=1e-4, seed=3)) == greedy, (
        "nearly cold, the most likely token is sampled"
    )


def test_long_texts_of_several_lines_are_written_whole(run, photos):
    """256 tokens for each prompt, longer than anything that was trained; lines stay lines in both formats."""
    (row,) = asked(
        run, photos / "0.png", Decoding(max_new_tokens=256, temperature=1.5, seed=1), prompts=("Write a story.",)
    )
    assert len(row["text"].split()) > 40
    row["text"] = "one\n\ntwo — “three”\u2028"
    for name in ("x.jsonl", "x.parquet"):
        with generate.writing(str(photos.parent / name)) as write:
            write(generate.pa.Table.from_pylist([row], schema=generate.GENERATED_SCHEMA))
    assert json.loads((photos.parent / "x.jsonl").read_bytes()) == row
    assert pq.read_table(photos.parent / "x.parquet").to_pylist() == [row]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_are_sampled_from_the_distribution_of_transformers(temperature, top_p):
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    warped = (
        TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
        if top_p < 1
        else logits / temperature
    )
    torch.testing.assert_close(probabilities(logits, temperature, top_p).float(), warped.softmax(-1))
    draws = 4000
    sampler = Sampler([str(n) for n in range(5)], draws, temperature, top_p, seed=0)
    drawn = torch.stack([sampler(logits, n) for n in range(draws)], 1)
    shares = torch.stack([row.bincount(minlength=50) for row in drawn]) / draws
    expected = warped.softmax(-1)
    assert float((shares - expected).abs().max()) < 4 * 0.5 / draws**0.5
    assert not bool((shares > 0)[expected == 0].any())


def test_a_file_that_is_not_finished_is_not_there(tmp_path):
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / name).write_text("of an earlier time")
        with pytest.raises(RuntimeError), generate.writing(str(tmp_path / name)) as write:
            write(generate.pa.Table.from_pylist([{"id": "1"}], schema=generate.GENERATED_SCHEMA))
            raise RuntimeError
        assert (tmp_path / name).read_text() == "of an earlier time"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


def test_only_runs_have_checkpoints(run):
    with pytest.raises(ConfigError, match="only runs have checkpoints"):
        find_model(str(run / "export"), str(run.parent), checkpoint="latest")


def test_a_run_s_own_data_layout_is_left_aside_and_overrides_come_last(run):
    config = find_model("my-run", str(run.parent), ["image.max_tiles=3", "data.columns.question=other"]).config
    assert (config.image.max_tiles, config.data.columns.question, config.data.format) == (3, "other", "auto")
    assert config.model.dtype == "float32" and config.lora.r == 4 and config.data.max_length == 8192
    assert find_model(str(run / "export"), "runs").config.model.dtype == "float32", "the dtype in which it was saved"


def test_a_run_with_the_earlier_names_of_settings_is_read(run, tmp_path):
    older = Path(shutil.copytree(run, tmp_path / "older"))
    settings = yaml.safe_load((older / "config.yaml").read_text())
    settings["train"]["deal"] = settings["train"].pop("load_balancing")
    del settings["simpo"]
    (older / "config.yaml").write_text(yaml.safe_dump(settings))
    assert find_model(str(older), "runs").config == find_model(str(run), "runs").config


def smolray(*arguments):
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_command_prints_answers_and_counts_and_writes_files(run, photos, greedy, tmp_path):
    options = ("--storage", run.parent, "--max-new-tokens", 12, *(o for p in PROMPTS for o in ("--prompt", p)))
    shown = smolray("my-run", photos / "0.png", *options)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[:2] == [f"0.png/1  {PROMPTS[0]}", greedy[0]["text"]]
    assert "3 answers" in shown.stderr
    for name in ("a.jsonl", "a.parquet"):
        done = smolray("my-run", photos, *options, "--out", tmp_path / name)
        assert done.exit_code == 0 and "9 answers, 1 error (corrupt_image 1)" in done.stderr, done.output
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == greedy
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == greedy


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope", "{photos}"], "there: my-run"),
        (["my-run", "{photos}/absent.png"], "does not exist"),
        (["my-run", "{photos}", "--out", "x.csv"], ".parquet or .jsonl"),
        (["my-run", "{photos}", "--question-column", "q"], "no columns"),
        (["my-run", "{photos}", "image.max_tile=3"], "max_tiles"),
        (["my-run", "{photos}", "--checkpoint", "step-00000009"], "step-00000009"),
    ],
)
def test_a_wrong_command_is_refused_in_one_message(run, photos, arguments, told):
    done = smolray(*(a.format(photos=photos) for a in arguments), "--storage", run.parent)
    assert done.exit_code == 2 and told in done.stderr and "Traceback" not in done.output, done.output


def test_nothing_answered_is_a_failure(run, photos):
    done = smolray("my-run", photos / "2.png", "--storage", run.parent)
    assert done.exit_code == 1 and "corrupt_image" in done.stdout and "0 answers, 1 error" in done.stderr
