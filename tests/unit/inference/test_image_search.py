"""`smolray search`: an index of images answers texts with the images that are nearest, as a comparison with all of
them would.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from smolray.cli import app as cli
from smolray.config import DataConfig
from smolray.data.collate import Group, collate_image_text
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.inference.image_search import ImageSearch
from smolray.inference.predictor import find_model
from smolray.objectives.contrastive import embeddings
from tests.offline import asked, picture, shard_row

TEXTS = ["a red box", "what shape is it?", "blue"]
SETTINGS = ["model.dtype=float32", "resources.use_gpu=no"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images and a broken one; more than a batch would go over Ray."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(64, 48, number))
    (folder / "broken.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module", params=["tiny_path", "published_path"])
def path(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def index(photos, path, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("index") / "photos")
    done = CliRunner().invoke(
        cli.app, ["search", "build", path, str(photos), *SETTINGS, "--out", out, "--prompt", "find this"]
    )
    assert done.exit_code == 0, done.output
    assert "left out: 1 (corrupt_image 1)" in done.output
    return out


def test_a_text_finds_what_a_comparison_with_every_picture_finds(index, photos, path):
    source = find_model(path, "runs", SETTINGS)
    model, encoder = ImageSearch(index).embed.predictor.model, source.encoder()
    names = sorted(p.name for p in photos.iterdir() if p.name != "broken.png")
    rows = [shard_row([(photos / name).read_bytes()], asked("find this", text)) for name in names for text in TEXTS]
    batch = collate_image_text([Group(row, (0,)) for row in rows], encoder)  # as in training
    with torch.no_grad():
        vectors = embeddings(model, batch).numpy()
    pairs = np.array(batch.meta["pairs"])
    cosines = (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).sum(-1).reshape(len(names), len(TEXTS))
    found = list(ImageSearch(index).find(TEXTS, top=4))
    for number, hits in enumerate(found):
        best = np.argsort(-cosines[:, number])[:4]
        assert [hit.id for hit in hits] == [names[n] for n in best]
        np.testing.assert_allclose([hit.similarity for hit in hits], cosines[best, number], atol=1e-5)
    assert len({tuple(hit.id for hit in hits) for hits in found}) > 1, (
        "every text finds the same: this test would show nothing"
    )


@pytest.mark.parametrize(
    ("overrides", "prompt"), [([], "Describe the image."), (["data.prompt=what colour?"], "what colour?")]
)
def test_without_a_prompt_images_are_embedded_as_in_training(
    photos,
    tiny_path,
    tmp_path,
    overrides,
    prompt,
):
    (tmp_path / "photos").mkdir()
    pictures = [(photos / f"{number}.png").read_bytes() for number in range(3)]
    for number, image in enumerate(pictures):
        (tmp_path / "photos" / f"{number}.png").write_bytes(image)
    out = f"{tmp_path}/index"
    done = CliRunner().invoke(
        cli.app, ["search", "build", tiny_path, str(tmp_path / "photos"), *SETTINGS, *overrides, "--out", out]
    )
    assert done.exit_code == 0, done.output
    assert (
        f"text with each image: '{prompt}'" in done.output
        and json.loads(Path(out, "index.json").read_text())["prompt"] == prompt
    )
    search, data = ImageSearch(out), DataConfig(prompt=prompt if overrides else "")
    rows = []
    for image in pictures:  # what prepare makes of a caption
        (sample,) = parse(
            {"image": {"bytes": image}, "caption": "a box"}, "0", data, ImageReader("", "", data.max_image_pixels)
        ).samples
        rows.append(shard_row([image], sample.conversation))
    batch = collate_image_text([Group(row, (0,)) for row in rows], search.source.encoder())
    with torch.no_grad():
        trained = embeddings(search.embed.predictor.model, batch).numpy()[[pair[0] for pair in batch.meta["pairs"]]]
    np.testing.assert_allclose(search.index.reconstruct_n(0, 3), trained, atol=1e-5)


def test_without_faiss_an_error_says_how_to_install_it(
    photos,
    tiny_path,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for command in (
        ["build", tiny_path, str(photos), *SETTINGS, "--out", str(tmp_path)],
        ["query", str(tmp_path), "a cat"],
    ):
        done = CliRunner().invoke(cli.app, ["search", *command])
        assert done.exit_code == 2
        assert "pip install 'smolray[search]'" in done.output, done.output
        assert not [*tmp_path.iterdir()]


def test_the_command_prints_paths_the_best_first(index, photos):
    done = CliRunner().invoke(cli.app, ["search", "query", index, *TEXTS, "--top", "2"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [lines[n] for n in (0, 3, 6)] == TEXTS
    scores = [float(lines[n].split()[0]) for n in (1, 2)]
    assert scores[0] >= scores[1] and lines[1].split()[1].startswith(str(photos))


def test_a_folder_without_an_index_is_refused(tmp_path):
    done = CliRunner().invoke(cli.app, ["search", "query", str(tmp_path), "a cat"])
    assert done.exit_code == 2
    assert "smolray search build" in done.output + (done.stderr or "")


def test_an_index_names_the_model_it_was_made_with(index, path):
    about = json.loads(Path(index, "index.json").read_text())
    assert about["images"] == 6 and about["config"]["model"]["path"] == path
    assert about["prompt"] == "find this"
