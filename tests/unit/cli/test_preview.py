"""Preview shows what training will see: the same tokens, the trained ones marked, what is left out and why; without Ray
and without a GPU.
"""

import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.cli.preview import item_text, lengths, lengths_table, preview
from smolray.config import ConfigError, RunConfig
from smolray.data.collate import Group, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.index import index_uri, write_index
from smolray.data.local import local_index
from smolray.data.sample import Conversation
from smolray.data.shards import ShardError
from tests.offline import asked, files_under, message, picture, shard_row
from tests.shards import vqa_rows, write_shards

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


def printed(renderable, **options):
    console = Console(width=200, **options)
    with console.capture() as out:
        console.print(renderable, soft_wrap=True)
    return out.get()


def test_items_are_what_training_gets(shards, rows, tiny_path):
    config = config_of(tiny_path, shards, data={"max_length": 4096})
    encoder, items = cached_encoder(config.model, config.data, config.image), list(preview(config, 10))
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
    item = list(preview(config_of(tiny_path, shards), 2))[1]
    assert item.images == (
        "120 x 60 PNG: 1 x 2 tiles and the whole, 48 image tokens",
        "64 x 64 JPEG: 1 tile, 16 image tokens",
    )
    shapes = [("image" if p.image else "trained" if p.trained else "text") for p in item.pieces]
    assert shapes == ["text", "image", "text", "trained", "text", "image", "text", "trained"]


def test_print_marks_the_trained_tokens_also_without_colours(shards, tiny_path):
    items = list(preview(config_of(tiny_path, shards), 4))
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
    import re

    item = list(preview(config_of(tiny_path, shards, data={"max_length": 100, "overlong": overlong}), 10))[4]
    assert item.id == "too-long" and re.fullmatch(note + ".*", item.note) and item.note in printed(item_text(item))
    assert (item.tokens == 100) == (overlong == "truncate_text")


def test_of_preference_data_both_endings_are_shown(tmp_path, tiny_path):
    pair = Conversation(
        "p-1", (message("user", None, "?"),), chosen=(message("assistant", "a"),), rejected=(message("assistant", "b"),)
    )
    folder = write_shards(str(tmp_path), [shard_row([picture(9, 9)], pair)])
    (item,) = preview(config_of(tiny_path, folder), 5)
    assert [p.text.strip() for p in item.pieces if p.trained] == ["a<end_of_utterance>", "b<end_of_utterance>"]
    assert "rejected: " in printed(item_text(item))


def test_lengths_are_those_of_the_index_whole_or_the_first_shard(tmp_path, tiny_path):
    folder = write_shards(str(tmp_path), vqa_rows("train", 20), rows_per_file=10)
    config = config_of(tiny_path, folder)
    index = local_index(folder, config)
    part = lengths(config)
    assert not part.complete and 0 < len(part.tokens) < len(index) and "first shard" in printed(lengths_table(part))
    write_index(index_uri(folder, cached_encoder(config.model, config.data, config.image)), index)
    whole = lengths(config)
    assert whole.complete and whole.rows == whole.tiles == 20 and whole.left_out == 0
    np.testing.assert_array_equal(whole.tokens, index["tokens"].to_numpy())
    assert whole.label_tokens == sum(index["label_tokens"].to_pylist()) and 0 <= whole.padding < 0.6
    lines = printed(lengths_table(whole)).splitlines()
    counts = [int(line.split("█")[0].split()[-1].replace(",", "")) for line in lines if "█" in line]
    assert sum(counts) == len(index) and f"longest {whole.tokens.max()}" in "".join(lines)


def test_what_is_left_out_is_counted(shards, tiny_path):
    summary = lengths(config_of(tiny_path, shards))
    assert summary.left_out == 1 and len(summary.tokens) == 5 and "left out" in printed(lengths_table(summary))


@pytest.mark.parametrize("shape", ["tiny", "random-2.2b"])
def test_offline_models_need_no_folder_and_leave_none(shards, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(shape, shards, data={"max_length": 8192})
    items = list(preview(config, 2))
    assert items[0].image_tokens == {"tiny": 16, "random-2.2b": 81}[shape]
    assert "what is it?" in "".join(p.text for p in items[0].pieces)
    assert files_under(tmp_path) == []


def test_an_offline_models_tokens_are_those_of_the_model_that_training_builds(shards):
    from smolray.cli.preview import preview_encoder
    from smolray.data.answers import count_answers
    from smolray.data.shards import read_manifest
    from smolray.model.tiny import build_tokenizer

    table = count_answers(shards, "shard-00000.parquet", 0).to_pylist()
    texts = [f"{q}\n {a}" for q, a in sorted({(line["question"], line["answer"]) for line in table})]
    mine = preview_encoder(config_of("tiny", shards), shards, read_manifest(shards)).tokenizer
    assert mine.backend_tokenizer.to_str() == build_tokenizer(texts).backend_tokenizer.to_str()


def test_raw_data_without_shards_says_prepare_first(tmp_path, tiny_path):
    raw = tmp_path / "rows.jsonl"
    raw.write_text('{"question": "a?", "answer": "b"}\n')
    with pytest.raises(ShardError, match=r"run `smolray prepare` first"):
        list(preview(config_of(tiny_path, str(raw), storage=str(tmp_path / "runs")), 1))
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        list(preview(config_of(tiny_path, ""), 1))


def test_the_command_prints_samples_and_the_histogram(shards, tiny_path):
    arguments = ["preview", f"model.path={tiny_path}", f"data.train={shards}", "data.max_length=300", "-n", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        result.output.count("trained\n") == 2 and "« a box<end_of_utterance>" in result.output and "█" in result.output
    )
    missing = CliRunner().invoke(app, ["preview", f"model.path={tiny_path}", f"data.train={shards}/nothing"])
    assert missing.exit_code == 2


def test_preview_loads_neither_ray_nor_a_gpu(shards):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom smolray.cli.app import app\n"
        f"out = CliRunner().invoke(app, ['preview', 'model.path=tiny', 'data.train={shards}'])\n"
        "assert out.exit_code == 0, out.output\nimport torch\n"
        "print('ray' in sys.modules, 'deepspeed' in sys.modules, torch.cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["False", "False", "False"], out.stdout + out.stderr
