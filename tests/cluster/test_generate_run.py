"""`smolray generate` over Ray Data: the rows of an input in its order, several models at a time, answers as in one
process.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from smolray import storage
from smolray.cli import app as cli
from smolray.config import load_config
from smolray.inference import generate
from smolray.inference.job import run_locally
from smolray.inference.predictor import Decoding, ModelSource, find_model
from smolray.inference.questions import PromptSettings, find_question_tasks
from tests.offline import picture

DECODING = Decoding(max_new_tokens=5, temperature=0.7, seed=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two files of one row group each: twelve images with one to three questions, a broken image, a row without
    any; and a torn file.
    """
    folder = tmp_path_factory.mktemp("rows")
    records = [
        {"id": f"{n}-{q}", "image": b"broken" if n == 7 else picture(64, 64, n), "question": f"what is in image {q}?"}
        for n in range(12)
        for q in range(n % 3 + 1)
    ]
    records.insert(5, {"id": "empty", "image": None, "question": None})
    for number, part in enumerate((records[:16], records[16:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{number}.parquet")
    (folder / "9.parquet").write_bytes(b"PAR1 torn")
    return folder, [r["id"] for r in records]


def test_rows_are_answered_over_ray_in_order_as_in_one_process(ray_cluster, rows, tiny_path, tmp_path):
    folder, ids = rows
    source = find_model(tiny_path, "runs", ["model.dtype=float32", "resources.use_gpu=no"])
    prompt_settings = PromptSettings(source.config.data)
    question_tasks = find_question_tasks(str(folder), prompt_settings, 4)
    assert len(question_tasks) == 3, "two tasks read the rows, and one file cannot be opened"
    with generate.writing(str(tmp_path / "out.parquet")) as write:
        for table in generate.answers(source, question_tasks, prompt_settings, DECODING, batch_size=4, workers=2):
            write(table)
    got = pq.read_table(tmp_path / "out.parquet").to_pylist()
    job = generate.answering_job(source, question_tasks, prompt_settings, DECODING, batch_size=100)
    assert got == [row for table in run_locally(job) for row in table.to_pylist()]
    assert [row["id"] for row in got] == [*ids, "9.parquet"]
    assert {row["id"]: row["error"].partition(":")[0] for row in got if row["error"]} == {
        "empty": "wrong_columns",
        "7-0": "corrupt_image",
        "7-1": "corrupt_image",
        "9.parquet": "torn_file",
    }
    assert len({row["text"] for row in got}) > 5, "the answers do not vary: this test would show nothing"


def test_photos_in_a_bucket_are_answered_into_the_bucket(s3_server, tiny_path):
    for number in range(3):
        storage.write_bytes(f"s3://bucket/photos/{number}.png", picture(64, 64, number) if number != 1 else b"broken")
    command = [
        "generate",
        tiny_path,
        "s3://bucket/photos",
        "--out",
        "s3://bucket/answers/a.parquet",
        "--max-new-tokens",
        "4",
    ]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0 and "2 answers, 1 error (corrupt_image 1)" in done.stderr, done.output
    rows = pq.read_table(pa.BufferReader(storage.read_bytes("s3://bucket/answers/a.parquet"))).to_pylist()
    assert [row["path"] for row in rows] == [f"s3://bucket/photos/{n}.png" for n in range(3)]
    assert [bool(row["text"]) for row in rows] == [True, False, True]


def test_the_arguments_of_an_actor_hold_no_weights(tiny_path):
    import cloudpickle

    config = load_config(None, [f"model.path={tiny_path}"])
    assert len(cloudpickle.dumps(ModelSource(config))) < 20_000
