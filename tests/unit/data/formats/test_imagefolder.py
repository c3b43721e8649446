"""A folder of images by class is a data set of labels; nothing is guessed from other folders."""

import pytest

from smolray.config import DataConfig
from smolray.data.first_rows import first_rows
from smolray.data.formats.discover import list_read_tasks, read_rows, resolve
from smolray.data.formats.source import SourceError
from tests.offline import picture


def write(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(8, 6, number))
    return str(folder)


def test_each_image_has_the_name_of_its_folder(tmp_path):
    source = write(tmp_path, "cat/a.png", "cat/b.png", "dog/a.png", "dog/more/c.png")
    found = first_rows(source, DataConfig(), 10)
    said = [(row.images, row.conversations[0].messages[-1].text) for row in found.rows]
    assert said == [((picture(8, 6, n),), name) for n, name in enumerate(["cat", "cat", "dog", "more"])]
    assert first_rows(source, DataConfig(format="imagefolder"), 10).read == 4


def test_the_rows_do_not_depend_on_the_cut(tmp_path):
    source = resolve(write(tmp_path, *(f"{n % 3}/{n}.png" for n in range(20))), DataConfig())
    whole = [row for task in list_read_tasks(source) for row in read_rows(task)]
    tasks = list_read_tasks(source, task_bytes=200)
    assert [row for task in tasks for row in read_rows(task)] == whole and len(tasks) > 5 and len(whole) == 20
    assert [row.row for row in whole] == list(range(20))


def test_splits_of_classes_are_chosen(tmp_path):
    source = write(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png")
    with pytest.raises(SourceError, match=r"several splits \(train, validation\)"):
        resolve(source, DataConfig())
    assert first_rows(f"{source}#val", DataConfig(), 10).read == 2


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("train2017/a.png", "val2017/b.png"), ("images/a.png",)])
def test_images_without_classes_are_refused(tmp_path, names):
    with pytest.raises(SourceError, match="images need answers or captions"):
        resolve(write(tmp_path, *names), DataConfig())
