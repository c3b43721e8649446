"""Prepare as Ray Data jobs: every row once from every format, the same bytes however the work is cut or interrupted, on
disk and on S3.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.easyvqa import export_easy_vqa
from smolray import storage
from smolray.config import DataConfig, RunConfig, load_config
from smolray.data.formats.source import SourceError
from smolray.data.prepare import prepare, prepare_run, shard_folder
from smolray.data.shards import ROW_GROUP_ROWS, ShardError, ShardManifest, decode_rows, read_manifest

ROOT = Path(__file__).parents[2]
QUESTIONS = 1500
SMALL = DataConfig(shard_bytes=2**16)


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """train.parquet: the first 1,500 questions of easy-vqa, in row groups of 1,000."""
    folder = tmp_path_factory.mktemp("questions")
    export_easy_vqa(folder, limit=QUESTIONS)
    return folder


@pytest.fixture(scope="session")
def shards(ray_cluster, questions, tmp_path_factory) -> Path:
    """What an undisturbed prepare makes of them: the yardstick of the tests below."""
    out = tmp_path_factory.mktemp("shards")
    prepare(str(questions / "train.parquet"), str(out), SMALL)
    return out


def rows_of(folder) -> list:
    names = [f.name for f in read_manifest(str(folder)).files]
    return [
        row for name in names for row in decode_rows(pq.read_table(io.BytesIO(storage.read_bytes(f"{folder}/{name}"))))
    ]


def shard_bytes(folder) -> dict[str, bytes]:
    return {
        info.base_name: storage.read_bytes(f"{folder}/{info.base_name}")
        for info in storage.list_files(str(folder))
        if info.base_name.startswith("shard-")
    }


def content_of(folder) -> Counter:
    """Each question once: (image, question, answer)."""
    return Counter(
        (row.images[0], c.messages[0].text, c.messages[1].text, c.type)
        for row in rows_of(folder)
        for c in row.conversations
    )


def as_parquet(rows, folder):
    return folder / "train.parquet"


def as_tars(rows, folder):
    tars = [tarfile.open(folder / f"tars-{n}.tar", "w") for n in range(3)]  # noqa: SIM115
    for number, row in enumerate(rows):
        meta = json.dumps({k: row[k] for k in ("question", "answer", "question_type", "question_id")}).encode()
        for name, content in ((f"{number}.png", row["image"]["bytes"]), (f"{number}.json", meta)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tars[number % 3].addfile(info, io.BytesIO(content))
    for tar in tars:
        tar.close()
    return f"{folder}/tars-*.tar"


def as_llava(rows, folder):
    (folder / "images").mkdir(exist_ok=True)
    with (folder / "llava.jsonl").open("w") as file:
        for row in rows:
            (folder / "images" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
            turns = [{"from": "human", "value": "<image>\n" + row["question"]}, {"from": "gpt", "value": row["answer"]}]
            record = {
                "id": row["question_id"],
                "image": f"images/{row['image']['path']}",
                "conversations": turns,
                "question_type": row["question_type"],
            }
            file.write(json.dumps(record) + "\n")
    return folder / "llava.jsonl"


def as_hub(rows, folder):
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "train.parquet").write_bytes((folder / "train.parquet").read_bytes())
    return folder / "hub"


@pytest.mark.parametrize("write", [as_parquet, as_tars, as_llava, as_hub])
def test_every_row_arrives_once_from_every_format(ray_cluster, questions, tmp_path, write):
    rows = pq.read_table(questions / "train.parquet").to_pylist()
    data = SMALL.replace({"format": "hub"}) if write is as_hub else SMALL
    manifest = prepare(str(write(rows, questions)), str(tmp_path / "out"), data, task_bytes=30_000)
    assert content_of(tmp_path / "out") == Counter(
        (r["image"]["bytes"], r["question"], r["answer"], r["question_type"]) for r in rows
    )
    assert (manifest.conversations, manifest.quarantined) == (QUESTIONS, {})
    ids = [c.id for row in rows_of(tmp_path / "out") for c in row.conversations]
    # Two questions of one image can be word for word the same, and stay two; ids are those of the source.
    assert sorted(ids) == sorted(f"train-{n}" for n in range(QUESTIONS))


def test_questions_about_one_image_are_one_row_and_rows_are_shuffled(shards, questions):
    rows = rows_of(shards)
    assert len({row.images for row in rows}) == len(rows) == read_manifest(str(shards)).images
    first = [min(int(c.id.split("-")[1]) for c in row.conversations) for row in rows]
    ascending = sum(a < b for a, b in pairwise(first)) / len(first)
    assert 0.35 < ascending < 0.65
    groups = [
        pq.read_metadata(shards / f.name).row_group(g).num_rows
        for f in read_manifest(str(shards)).files
        for g in range(2)
    ]
    assert max(groups) <= ROW_GROUP_ROWS


def test_shards_do_not_depend_on_how_the_work_is_cut_but_on_the_seed(ray_cluster, questions, shards, tmp_path):
    source = str(questions / "train.parquet")
    prepare(source, str(tmp_path / "cut"), SMALL, task_bytes=1)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(shards) and len(shard_bytes(shards)) > 3
    prepare(source, str(tmp_path / "seed"), SMALL, seed=1)
    assert shard_bytes(tmp_path / "seed") != shard_bytes(shards)
    assert content_of(tmp_path / "seed") == content_of(shards)


class Stop(Exception):
    pass


def stopping_at(phase, piece):
    def progress(now, done, pieces):
        if (now, done) == (phase, piece):
            raise Stop

    return progress


@pytest.mark.parametrize(("phase", "piece"), [("read", 1), ("write", 1), ("write", 3)])
def test_an_interrupted_prepare_resumes_where_it_was(ray_cluster, questions, shards, tmp_path, phase, piece):
    source, out = str(questions / "train.parquet"), tmp_path / "out"
    with pytest.raises(Stop):
        prepare(source, str(out), SMALL, progress=stopping_at(phase, piece), task_bytes=1)
    assert not (out / "manifest.json").exists()
    time.sleep(1)  # tasks under way when the driver stopped may still finish
    tasks = len(list(out.glob(".staging/*/tasks/*.json")))
    whole = [out / f"{marker.stem}.parquet" for marker in out.glob(".staging/*/shards/*.json")]
    kept = {p: p.stat().st_mtime_ns for p in whole}
    assert (tasks if phase == "read" else len(whole)) >= piece
    seen = []
    prepare(source, str(out), SMALL, progress=lambda *what: seen.append(what), task_bytes=1)
    assert shard_bytes(out) == shard_bytes(shards)
    assert {p: p.stat().st_mtime_ns for p in whole} == kept, "a finished shard was written again"
    assert sum(phase == "read" for phase, *_ in seen) == 2 - tasks, "a finished task was read again"
    assert not (out / ".staging").exists()


def test_a_torn_shard_is_not_trusted_before_the_end_nor_after_it(ray_cluster, questions, shards, tmp_path):
    source, out = str(questions / "train.parquet"), tmp_path / "out"
    with pytest.raises(Stop):
        prepare(source, str(out), SMALL, progress=stopping_at("write", 3))
    time.sleep(1)
    victim = sorted(out.glob("shard-*"))[0]
    victim.write_bytes(b"x" + victim.read_bytes()[1:])  # same size, other bytes
    prepare(source, str(out), SMALL)
    assert shard_bytes(out) == shard_bytes(shards)
    victim.write_bytes(victim.read_bytes()[:-100])
    prepare(source, str(out), SMALL)
    assert shard_bytes(out) == shard_bytes(shards)


def test_a_finished_folder_is_returned_at_once_and_never_mixed(shards, questions):
    before = (shards / "manifest.json").stat().st_mtime_ns
    assert prepare(str(questions / "train.parquet"), str(shards), SMALL) == read_manifest(str(shards))
    assert (shards / "manifest.json").stat().st_mtime_ns == before
    for source, data, seed in (
        (questions / "test.parquet", SMALL, 0),
        (questions / "train.parquet", DataConfig(), 0),
        (questions / "train.parquet", SMALL, 5),
    ):
        with pytest.raises(ShardError, match="already holds shards of another source, other settings or another seed"):
            prepare(str(source), str(shards), data, seed)


def test_too_many_bad_rows_stop_prepare_without_reading_the_rest_again(ray_cluster, tmp_path):
    records = [{"question": f"q{n}", "answer": "a"} for n in range(60)]
    bad = [{"question": "q", "answer": ""}] * 3 + [{"image": "gone.png", "question": "q", "answer": "a"}] * 2
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records + bad)))
    out = tmp_path / "out"
    with pytest.raises(SourceError) as error:
        prepare(str(tmp_path / "x.jsonl"), str(out), DataConfig())
    for said in (
        "5 of 65 rows",
        "data.max_bad_fraction = 0.01",
        "empty_answer: 3",
        "missing_file: 2",
        "x.jsonl#60: empty_answer",
        str(out / "quarantine"),
    ):
        assert said in str(error.value)
    seen = []
    manifest = prepare(
        str(tmp_path / "x.jsonl"), str(out), DataConfig(max_bad_fraction=0.1), progress=lambda *what: seen.append(what)
    )
    assert {phase for phase, *_ in seen} == {"write"}
    assert (manifest.conversations, manifest.quarantined) == (60, {"empty_answer": 3, "missing_file": 2})
    (quarantine,) = (out / "quarantine").glob("*.parquet")
    assert [(r["id"], r["reason"], r["row"]) for r in pq.read_table(quarantine).to_pylist()][3] == (
        "x.jsonl#63",
        "missing_file",
        63,
    )


def test_repeated_ids_get_the_place_of_their_row(ray_cluster, tmp_path):
    records = [{"id": n % 3 if n < 6 else n, "question": f"q{n}", "answer": "a"} for n in range(9)] + [
        {"id": 7, "question": "q7", "answer": "a"}
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), DataConfig(), task_bytes=16 * 100)
    ids = sorted(c.id for row in rows_of(tmp_path / "out") for c in row.conversations)
    assert ids == sorted(["6", "8", "7@x.jsonl#7", "7@x.jsonl#9", *(f"{n % 3}@x.jsonl#{n}" for n in range(6))])


def test_a_run_finds_its_shards_and_reads_a_shard_folder_in_place(ray_cluster, questions, shards, tmp_path):
    def config(**data):
        return RunConfig(storage=str(tmp_path / "runs"), data=SMALL.replace({k: str(v) for k, v in data.items()}))

    raw = config(train=questions / "train.parquet", validation=questions / "test.parquet")
    manifests = prepare_run(raw)
    assert [manifests[part].conversations for part in ("train", "validation")] == [QUESTIONS, QUESTIONS]
    assert read_manifest(shard_folder(raw, "train")) == manifests["train"] == read_manifest(str(shards))
    assert Path(shard_folder(raw, "train")).parts[-4:-2] == ("runs", "shards")
    assert shard_folder(raw, "train") != shard_folder(raw, "validation")
    assert shard_folder(config(train=questions / "train.parquet", shards=tmp_path / "mine"), "train") == str(
        tmp_path / "mine" / "train"
    )
    ready = config(train=shards)
    assert shard_folder(ready, "train") == str(shards)
    assert prepare_run(ready) == {"train": read_manifest(str(shards))}


def test_a_glob_that_matches_fewer_files_than_before_is_told(ray_cluster, tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"id": str(n), "question": f"{n}?", "answer": "x"}) + "\n")
    config = RunConfig(storage=str(tmp_path / "runs"), data=SMALL.replace({"train": f"{tmp_path}/*.jsonl"}))
    assert prepare_run(config)["train"].account["gone"] == 0
    (tmp_path / "1.jsonl").unlink()
    assert prepare_run(config)["train"].account["gone"] == 1


@pytest.fixture
def job():
    """Starts jobs/prepare.py as a process with a Ray of its own, whose workers have the given environment."""
    # short: socket paths have a limit
    with tempfile.TemporaryDirectory(prefix="sr", ignore_cleanup_errors=True) as folder:
        yield lambda *arguments, **environment: start_job(folder, *arguments, **environment)


def start_job(folder, *arguments, **environment):
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), f"data.shard_bytes={SMALL.shard_bytes}", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_job_prepares_from_s3_to_s3(job, questions, shards, s3_server):
    storage.write_bytes("s3://bucket/raw/train.parquet", (questions / "train.parquet").read_bytes())
    process = job("data.train=s3://bucket/raw/train.parquet", "out=s3://bucket/shards", **s3_server)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{QUESTIONS:,}" in out and "none" in out and "rows/s" in out and "train: s3://bucket/shards/train" in out
    assert shard_bytes("s3://bucket/shards/train") == shard_bytes(shards)
    assert not storage.list_files("s3://bucket/shards/train/.staging", recursive=True)
    assert isinstance(read_manifest("s3://bucket/shards/train"), ShardManifest)


@pytest.mark.faults
def test_a_killed_job_resumes_and_writes_the_same_bytes(job, questions, shards, tmp_path):
    arguments = [f"data.train={questions / 'train.parquet'}", f"out={tmp_path / 'out'}"]
    process = job(*arguments)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("train/shard-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert (
        list((tmp_path / "out").glob("train/shard-*")) and not (tmp_path / "out" / "train" / "manifest.json").exists()
    )
    process = job(*arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert shard_bytes(tmp_path / "out" / "train") == shard_bytes(shards)


def test_the_job_says_what_is_wrong_and_exits_with_2(job, tmp_path):
    process = job(f"data.train={tmp_path / 'nothing'}", f"out={tmp_path / 'out'}")
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and "does not exist; expected a file, a folder, a glob" in err
        and "Traceback" not in err
    )
    assert load_config(None, ["data.train=x"]).data.train == "x"
