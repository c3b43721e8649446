"""Preview shows what training will see: the same tokens, the trained ones marked, what is left out and why.

It needs neither Ray nor a GPU, and reads raw data as well as prepared shards.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.cli.preview import RAW_ROWS, open_preview, preview_encoder, raw_text
from smolray.cli.preview_lengths import lengths, lengths_table
from smolray.cli.preview_samples import item_text, preview_item
from smolray.config import ConfigError, RunConfig
from smolray.data.answers import count_answers
from smolray.data.collate import Group, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.formats.source import SourceError
from smolray.data.index import index_uri, write_index
from smolray.data.local import local_index
from smolray.data.sample import Conversation
from smolray.data.shards import read_manifest
from smolray.model.tiny import build_tokenizer
from tests.offline import asked, files_under, message, picture, shard_row
from tests.shards import vqa_rows, write_shards

ROOT = Path(__file__).parents[3]
LONG = "word " * 300
TURNS = (
    message("user", None, "what?"),
    message("assistant", "a box"),
    message("user", None, "and?"),
    message("assistant", "two"),
)


@pytest.fixture(scope="module")
def rows():
    return [
        shard_row([picture(64, 64)], asked("what is it?", "a box")),
        shard_row([picture(120, 60), picture(64, 64, 2, form="JPEG")], Conversation("turns", TURNS)),
        shard_row([], asked("two and two?", "four", 0)),
        shard_row([picture(60, 60, 3)], asked("say <image> and \x1b[31m!", "no [red]tags[/red]")),
        shard_row([picture(60, 60, 4)], asked("long?", LONG, name="too-long"), asked("short?", "yes")),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, rows):
    return write_shards(str(tmp_path_factory.mktemp("shards")), rows)


def config_of(path, train, **sections):
    image = {"longest_edge": 128}
    return RunConfig(
        model={"path": path},
        image=image,
        **{"data": {"train": train, "max_length": 300} | sections.pop("data", {})} | sections,
    )


def items_of(config, count):
    """The first conversation of each of the first rows, as the command prints them."""
    with open_preview(config, count) as data:
        return [preview_item(row, row.conversations[0], data.encoder) for row in islice(data.rows(), count)]


def lengths_of(config):
    with open_preview(config, 0) as data:
        return lengths(data, config)


def printed(renderable, **options):
    console = Console(width=200, **options)
    with console.capture() as out:
        console.print(renderable, soft_wrap=True)
    return out.get()


def test_items_are_what_training_gets(shards, rows, tiny_path):
    config = config_of(tiny_path, shards, data={"max_length": 4096})
    encoder, items = cached_encoder(config.model, config.data, config.image), items_of(config, 10)
    assert [item.id for item in items] == [row.conversations[0].id for row in rows]
    for item, row in zip(items, rows, strict=True):
        batch = collate_training([Group(row, (0,))], encoder)
        assert item.tokens == batch.input_ids.shape[1] and item.label_tokens == batch.label_tokens
        assert item.image_tokens == int((batch.input_ids == encoder.image_token_id).sum())
        assert "".join(p.text for p in item.pieces if p.trained) == encoder.tokenizer.decode(batch.target_ids)
        plain = "".join(p.text for p in item.pieces if not p.image and not p.trained)
        assert row.conversations[0].messages[0].text in plain and item.note == ""
        assert [p.image for p in item.pieces].count(True) == len(row.images) == len(item.images)


def test_pictures_are_told_with_their_size_tiles_and_tokens(shards, tiny_path):
    item = items_of(config_of(tiny_path, shards), 2)[1]
    assert item.images == (
        "120 x 60 PNG: 1 x 2 tiles and the whole, 48 image tokens",
        "64 x 64 JPEG: 1 tile, 16 image tokens",
    )
    shapes = [("image" if p.image else "trained" if p.trained else "text") for p in item.pieces]
    assert shapes == ["text", "image", "text", "trained", "text", "image", "text", "trained"]


def test_print_marks_the_trained_tokens_also_without_colours(shards, tiny_path):
    items = items_of(config_of(tiny_path, shards), 4)
    out = printed(item_text(items[0]))
    assert "<|im_start|>User:<image 1: 19 tokens>what is it?<end_of_utterance>" in out
    assert "Assistant:« a box<end_of_utterance>↵»" in out and "\x1b" not in out
    assert "\x1b[1;32m« a box" in printed(item_text(items[0]), force_terminal=True, color_system="standard")
    hostile = printed(item_text(items[3]), force_terminal=True, color_system="standard")
    assert "say <image> and \\x1b[31m!" in hostile and "no [red]tags[/red]" in hostile


@pytest.mark.parametrize(
    ("overlong", "note"),
    [
        ("drop", "left out: [0-9]+ tokens, data.max_length = 100"),
        ("truncate_text", "cut from [0-9]+ to 100 tokens"),
        ("error", "too-long: [0-9]+ tokens, data.max_length = 100"),
    ],
)
def test_overlong_samples_are_shown_with_what_becomes_of_them(shards, tiny_path, overlong, note):
    item = items_of(config_of(tiny_path, shards, data={"max_length": 100, "overlong": overlong}), 10)[4]
    assert item.id == "too-long" and re.fullmatch(note + ".*", item.note) and item.note in printed(item_text(item))
    assert (item.tokens == 100) == (overlong == "truncate_text")


def test_of_preference_data_both_endings_are_shown(tmp_path, tiny_path):
    pair = Conversation(
        "p-1", (message("user", None, "?"),), chosen=(message("assistant", "a"),), rejected=(message("assistant", "b"),)
    )
    folder = write_shards(str(tmp_path), [shard_row([picture(9, 9)], pair)])
    (item,) = items_of(config_of(tiny_path, folder), 5)
    assert [p.text.strip() for p in item.pieces if p.trained] == ["a<end_of_utterance>", "b<end_of_utterance>"]
    assert "rejected: " in printed(item_text(item))


def test_lengths_are_those_of_the_index_whole_or_the_first_shard(tmp_path, tiny_path):
    folder = write_shards(str(tmp_path), vqa_rows("train", 20), rows_per_file=10)
    config = config_of(tiny_path, folder)
    index = local_index(folder, config)
    part = lengths_of(config)
    assert part.sample and 0 < len(part.tokens) < len(index) and "first shard" in printed(lengths_table(part))
    write_index(index_uri(folder, cached_encoder(config.model, config.data, config.image)), index)
    whole = lengths_of(config)
    assert whole.sample == "" and whole.rows == whole.tiles == 20 and whole.left_out == 0
    np.testing.assert_array_equal(whole.tokens, index["tokens"].to_numpy())
    assert whole.label_tokens == sum(index["label_tokens"].to_pylist()) and 0 <= whole.padding < 0.6
    lines = printed(lengths_table(whole)).splitlines()
    counts = [int(line.split("█")[0].split()[-1].replace(",", "")) for line in lines if "█" in line]
    assert sum(counts) == len(index) and f"longest {whole.tokens.max()}" in "".join(lines)


def test_what_is_left_out_is_counted(shards, tiny_path):
    summary = lengths_of(config_of(tiny_path, shards))
    assert summary.left_out == 1 and len(summary.tokens) == 5 and "left out" in printed(lengths_table(summary))


@pytest.mark.parametrize("shape", ["tiny", "random-2.2b"])
def test_offline_models_need_no_folder_and_leave_none(shards, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(shape, shards, data={"max_length": 8192})
    items = items_of(config, 2)
    assert items[0].image_tokens == {"tiny": 16, "random-2.2b": 81}[shape]
    assert "what is it?" in "".join(p.text for p in items[0].pieces)
    assert files_under(tmp_path) == []


def test_an_offline_models_tokens_are_those_of_the_model_that_training_builds(shards):
    table = count_answers(shards, "shard-00000.parquet", 0).to_pylist()
    texts = [f"{q}\n {a}" for q, a in sorted({(line["question"], line["answer"]) for line in table})]
    mine = preview_encoder(config_of("tiny", shards), shards, read_manifest(shards)).tokenizer
    assert mine.backend_tokenizer.to_str() == build_tokenizer(texts).backend_tokenizer.to_str()


# Raw data, before anything is prepared.


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
    records = [{"question": q, "answer": a, "image": f"{n}.png"} for q, a, n in rows]
    lines = "\n".join(map(json.dumps, records))
    (folder / "rows.json").write_text(json.dumps(records) if kind == "json" else lines)
    return folder / "rows.json"


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "jsonl", "json"])
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
        ("", "holds no rows"),
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
