"""Training and validation files are never read as one: a folder of several splits is refused until one is chosen."""

import pytest

from smolray.config import DataConfig
from smolray.data.formats.discover import resolve
from smolray.data.formats.source import SourceError
from smolray.data.formats.splits import split_of

DATA = DataConfig()


def names_of(source, data=DATA):
    return [uri.rpartition("/")[2] for uri, _ in resolve(str(source), data).files]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("vqa_train.jsonl", "train"),
        ("vqa-val.jsonl", "validation"),
        ("annotations/captions_train2017.json", "train"),
        ("v2_mscoco_val2014_annotations.json", "validation"),
        ("TextVQA_0.5.1_val.json", "validation"),
        ("data.test.csv", "test"),
        ("my-data-test.parquet", "test"),
        ("data/validation-00000-of-00002.parquet", "validation"),
        ("train/x/0.tar", "train"),
        ("vqaTrain.jsonl", "train"),
        ("train1.jsonl", "train"),
        ("vqa_trainval.jsonl", "train+validation"),
        ("train_and_val.jsonl", "train+validation"),
        ("trains.jsonl", ""),
        ("contest.jsonl", ""),
        ("x.jsonl", ""),
    ],
)
def test_a_split_is_read_from_any_part_of_a_name(path, split):
    assert split_of(path) == split


@pytest.mark.parametrize(
    "names",
    [
        ("vqa_train.jsonl", "vqa_val.jsonl"),
        ("my-data-train.csv", "my-data-dev.csv"),
        ("train/x.jsonl", "val/x.jsonl"),
        ("captions_train2017.jsonl", "captions_val2017.jsonl"),
        ("a.train.jsonl", "a.valid.jsonl"),
    ],
)
def test_a_folder_of_two_splits_is_refused_until_one_is_chosen(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match=rf"several splits \(train, validation\); choose with {tmp_path}#train"):
        resolve(str(tmp_path), DATA)
    assert names_of(f"{tmp_path}#train") == [names[0].rpartition("/")[2]]
    assert names_of(tmp_path, DataConfig(split="validation")) == [names[1].rpartition("/")[2]]
    with pytest.raises(SourceError, match="no split 'test'; splits found in its file names: train, validation"):
        resolve(f"{tmp_path}#test", DATA)


def test_a_file_of_another_split_is_refused_and_one_without_a_name_is_taken(tmp_path):
    for name in ("vqa_val.jsonl", "x.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match="no split 'train'; splits found in its file names: validation"):
        resolve(f"{tmp_path}/vqa_val.jsonl#train", DATA)
    assert names_of(f"{tmp_path}/vqa_val.jsonl#val") == ["vqa_val.jsonl"]
    assert names_of(f"{tmp_path}/x.jsonl#train") == ["x.jsonl"]
    with pytest.raises(SourceError, match=r"files of split validation \(vqa_val.jsonl\) and of none \(x.jsonl\)"):
        resolve(str(tmp_path), DATA)
    assert names_of(f"{tmp_path}#val") == ["vqa_val.jsonl"]
