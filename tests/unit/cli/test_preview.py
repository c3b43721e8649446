"""Preview reads raw data as well as prepared shards; it needs neither Ray nor a GPU, and leaves no files."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.cli.preview import RAW_ROWS, open_preview, preview_encoder, raw_text
from smolray.cli.preview_lengths import lengths, lengths_table
from smolray.cli.preview_samples import preview_item
from smolray.config import ConfigError
from smolray.data.answers import count_answers
from smolray.data.formats.source import SourceError
from smolray.data.shards import read_manifest
from smolray.model.tiny import build_tokenizer
from tests.offline import files_under, picture
from tests.previews import config_of, items_of, printed

pytestmark = pytest.mark.seconds

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("shape", ["tiny", "random-2.2b"])
def test_offline_models_need_no_folder_and_leave_none(shards, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(shape, shards, data={"max_length": 8192})
    items = items_of(config, 2)
    assert items[0].image_tokens == {"tiny": 16, "random-2.2b": 81}[shape]
    assert "what is it?" in "".join(p.text for p in items[0].pieces)
    assert files_under(tmp_path) == []


def test_the_preview_of_an_offline_model_has_the_tokens_of_training(shards):
    table = count_answers(shards, "shard-00000.parquet", 0).to_pylist()
    texts = [f"{q}\n {a}" for q, a in sorted({(line["question"], line["answer"]) for line in table})]
    mine = preview_encoder(config_of("tiny", shards), shards, read_manifest(shards)).tokenizer
    assert mine.backend_tokenizer.to_str() == build_tokenizer(texts).backend_tokenizer.to_str()


def png(number):
    return picture(64, 64, seed=number)


def raw_rows(count, questions=2):
    return [
        (f"what is in image {n // questions}, part {n % questions}?", f"box {n}", n // questions) for n in range(count)
    ]


def write_raw(folder, kind, count=6):
    """Raw data of one format in `folder`; the rows are the same in all of them."""
    rows = raw_rows(count)
    if kind == "parquet":
        records = [{"question": q, "answer": a, "image": {"bytes": png(n), "path": "x.png"}} for q, a, n in rows]
        pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "webdataset":
        with tarfile.open(folder / "rows.tar", "w") as tar:
            for number, (question, answer, image) in enumerate(rows):
                text = json.dumps({"question": question, "answer": answer}).encode()
                for suffix, content in (("png", png(image)), ("json", text)):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return folder / "rows.tar"

    for number in {image for _, _, image in rows}:
        (folder / f"{number}.png").write_bytes(png(number))
    if kind == "csv":
        lines = ["question,answer,image", *(f'"{q}",{a},{n}.png' for q, a, n in rows)]
        (folder / "rows.csv").write_text("\n".join(lines) + "\n")
        return folder / "rows.csv"

    records = [{"question": q, "answer": a, "image": f"{n}.png"} for q, a, n in rows]
    lines = "\n".join(map(json.dumps, records))
    (folder / "rows.json").write_text(json.dumps(records) if kind == "json" else lines)
    return folder / "rows.json"


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "jsonl", "json", "csv"])
def test_raw_data_of_any_format_is_previewed_unprepared(tmp_path, tiny_path, kind):
    (tmp_path / "raw").mkdir()
    raw = write_raw(tmp_path / "raw", kind)
    before = files_under(tmp_path)
    config = config_of(tiny_path, str(raw), storage=str(tmp_path / "runs"))
    with open_preview(config, 5) as data:
        rows, told = list(data.rows()), printed(raw_text(data.raw))
        summary = lengths(data, config)
        items = [preview_item(row, row.conversations[0], data.encoder) for row in rows]
    assert [len(row.conversations) for row in rows] == [2, 2, 2], "questions about one image share a row"
    assert "what is in image 0, part 0?" in "".join(piece.text for piece in items[0].pieces)
    assert len(summary.tokens) == 6 and summary.rows == 3
    assert "all 6 rows of the raw data" in told and "left out" not in told
    assert files_under(tmp_path) == before, "a preview leaves no files"


def test_a_raw_preview_reads_the_first_rows_only(tmp_path, tiny_path):
    raw = tmp_path / "rows.jsonl"
    raw.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(RAW_ROWS + 50)))
    config = config_of(tiny_path, str(raw))
    with open_preview(config, 5) as data:
        summary = lengths(data, config)
        assert f"the first {RAW_ROWS} rows" in printed(raw_text(data.raw))
    assert len(summary.tokens) == RAW_ROWS
    assert f"counted: the first {RAW_ROWS} rows" in printed(lengths_table(summary))
    with open_preview(config, RAW_ROWS + 10) as data:
        assert len(list(data.rows())) == RAW_ROWS + 10, "as many rows as are to be shown"


def test_a_raw_preview_tells_which_rows_are_left_out_and_why(tmp_path, tiny_path):
    (tmp_path / "torn.png").write_bytes(png(1)[:200])
    records = [
        {"question": "a?", "answer": "b"},
        {"question": "a?", "answer": ""},
        {"question": "a?", "answer": "b", "image": "torn.png"},
        {"question": "a?", "answer": "b", "image": "gone\x1b.png"},
    ]
    raw = tmp_path / "rows.jsonl"
    raw.write_text("\n".join(map(json.dumps, records)) + "\nno json\n")
    with open_preview(config_of(tiny_path, str(raw)), 5) as data:
        told = printed(raw_text(data.raw))
    assert "left out: 4 of 5 rows" in told and "\x1b" not in told
    for reason in ("rows.jsonl#1: empty_answer", "#2: truncated_image", "#3: missing_file", "#4: invalid_json"):
        assert reason in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"number": 1}\n',
            r"none of the first 1 rows of .*can be used:\n  rows.jsonl#0: wrong_columns: no known layout",
        ),
        ("\n", "holds no rows"),
        ("", "is damaged: it has no bytes"),
    ],
)
def test_raw_data_that_cannot_be_used_is_refused_with_the_reason(tmp_path, tiny_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SourceError, match=message):
        items_of(config_of(tiny_path, str(tmp_path / "rows.jsonl")), 1)


def test_a_preview_without_data_names_the_setting(tiny_path):
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        items_of(config_of(tiny_path, ""), 1)


def test_the_command_prints_samples_and_the_histogram(shards, tiny_path):
    arguments = ["preview", f"model.path={tiny_path}", f"data.train={shards}", "data.max_length=300", "-n", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("trained\n") == 2
    assert "« a box<end_of_utterance>" in result.output and "█" in result.output
    missing = CliRunner().invoke(app, ["preview", f"model.path={tiny_path}", f"data.train={shards}/nothing"])
    assert missing.exit_code == 2


@pytest.mark.parametrize("raw", [False, True], ids=["shards", "raw"])
def test_preview_loads_neither_ray_nor_a_gpu(shards, tmp_path, raw):
    train = write_raw(tmp_path, "parquet") if raw else shards
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom smolray.cli.app import app\n"
        f"out = CliRunner().invoke(app, ['preview', 'model.path=tiny', 'data.train={train}'])\n"
        "assert out.exit_code == 0, out.output\nimport torch\n"
        "print('ray' in sys.modules, 'deepspeed' in sys.modules, torch.cuda.is_initialized())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.stdout.split() == ["False", "False", "False"], out.stdout + out.stderr
