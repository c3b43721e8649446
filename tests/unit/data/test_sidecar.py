"""Sidecars of vision features: they give the same hidden states as the images; foreign or damaged ones are refused or
written again.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolray.config import load_config
from smolray.data.batch import Batch
from smolray.data.collate import collate_prompts
from smolray.data.encode import cached_encoder
from smolray.data.local import LocalStream, local_index, local_plan
from smolray.data.reader import ALONE, ShardReader
from smolray.data.shards import ShardError, read_manifest, write_shards
from smolray.data.sidecar import complete, is_whole, unfinished, write_table
from smolray.model.forward import hidden_states
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix
from smolray.precompute.features import FeatureWriter, features_bytes, features_sidecar
from smolray.precompute.local import local_sidecars
from tests.offline import asked, picture, shard_row

pytestmark = pytest.mark.seconds

SQUARE, WIDE, SPLIT = (60, 60), (120, 60), (150, 100)


def some_rows():
    """Single images, several, the same twice and in many rows, split ones, and text alone."""
    shared, rows = picture(*SQUARE, seed=99), []
    for i in range(6):
        rows.append(
            shard_row(
                [picture(*SQUARE, seed=i)], asked("what?", "box", name=f"a{i}"), asked("which?", "red", name=f"b{i}")
            )
        )
        rows.append(shard_row([picture(*SPLIT, seed=i)], asked("what?", "cat", name=f"c{i}")))
        rows.append(shard_row([picture(*WIDE, seed=i), shared, shared], asked("both?", "yes", 3, name=f"d{i}")))
        rows.append(shard_row([], asked(f"{i} and 1?", str(i + 1), 0, name=f"e{i}")))
    return rows


@pytest.fixture
def shards(tmp_path) -> str:
    """A shard folder of two files."""
    return write_shards(str(tmp_path / "shards"), some_rows(), rows_per_file=14)


@pytest.fixture
def make_config(tiny_path):
    def make(*overrides):
        return load_config(
            None,
            [
                f"model.path={tiny_path}",
                "model.dtype=float32",
                "model.train=[text]",
                "image.longest_edge=128",
                "train.per_device_train_batch_size=5",
                "model.vision_features=precompute",
                *overrides,
            ],
        )

    return make


def batches(folder, config, sidecars=ALONE, plan=None):
    plan = plan or local_plan(folder, config)
    return list(LocalStream(folder, plan, range(len(plan)), config, sidecars))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("train", "tokens"), [("[text]", 16), ("[text,connector]", 64)])
def test_features_read_in_place_of_images_give_the_same_hidden_states(shards, make_config, train, tokens, dtype):
    config = make_config(f"model.train={train}", f"model.dtype={dtype}", "train.per_device_train_batch_size=3")
    model, without = (
        load_model(config.model).eval(),
        drop_submodules(load_model(config.model), frozen_prefix(config)).eval(),
    )
    counts = []
    for want, sent in zip(
        batches(shards, config), batches(shards, config, local_sidecars(shards, config)), strict=True
    ):
        got = Batch.from_bytes(sent.to_bytes())
        counts.append(len(got.features))
        assert len(got.pixel_values) == 0 and len(got.features) == len(want.pixel_values)
        assert torch.equal(got.tile_order, want.tile_order) and got.meta == want.meta
        assert not len(got.features) or (
            got.features.shape[1] == tokens and got.features.dtype == getattr(torch, dtype)
        )
        with torch.no_grad():
            a, b = hidden_states(model, want), hidden_states(without, got)
        assert float((a - b).abs().max() / a.abs().max()) < (1e-6 if dtype == "float32" else 2e-2)
    assert max(counts) > 8


def test_prompts_of_an_evaluation_read_features_as_well(shards, make_config):
    config = make_config()
    encoder, plan, files = (
        cached_encoder(config.model, config.data, config.image),
        local_plan(shards, config),
        names_of(shards),
    )
    specs, sidecars = [plan.micro_batch(n) for n in range(len(plan))], local_sidecars(shards, config)
    for want, got in zip(
        ShardReader(shards, files).groups(specs), ShardReader(shards, files, sidecars).groups(specs), strict=True
    ):
        a, b = collate_prompts(want, encoder), collate_prompts(got, encoder)
        assert torch.equal(a.input_ids, b.input_ids) and a.meta == b.meta and len(a.pixel_values) == len(b.features)


def test_images_are_not_read_where_features_are(shards, make_config):
    """Their column is overwritten: the batches stay as they were."""
    config = make_config()
    plan, sidecars = local_plan(shards, config), local_sidecars(shards, config)
    before = batches(shards, config, sidecars, plan)
    for name in names_of(shards):
        blind(Path(shards, name))
    with pytest.raises(OSError, match="cannot identify image"):
        batches(shards, config, plan=plan)
    assert [b.to_bytes() for b in batches(shards, config, sidecars, plan)] == [b.to_bytes() for b in before]


def test_the_size_that_is_said_is_the_size_of_what_is_written(shards, make_config):
    for overrides in ([], ["model.dtype=bfloat16", "model.train=[text,connector]"]):
        config = make_config(*overrides)
        uri = local_sidecars(shards, config).features
        said = features_bytes(local_index(shards, config), config, 2)
        for name, expected in zip(names_of(shards), said, strict=True):
            values = pq.read_table(Path(uri, name))["features"].to_pylist()
            assert sum(len(image) for row in values for image in row) == expected
            assert expected < Path(uri, name).stat().st_size < 1.1 * expected
            assert pq.ParquetFile(Path(uri, name)).num_row_groups == pq.ParquetFile(Path(shards, name)).num_row_groups


def test_other_frozen_weights_processor_or_dtype_mean_another_folder(shards, make_config, tmp_path):
    base = make_config()

    def changed(part):
        folder = shutil.copytree(base.model.path, tmp_path / part)
        tensors = load_file(folder / "model.safetensors")
        tensors[next(name for name in tensors if part in name)].view(-1)[0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return make_config(f"model.path={folder}")

    one = features_sidecar(shards, base).identity
    assert features_sidecar(shards, changed("text_model")).identity == one, "the text model has no part in it"
    assert features_sidecar(shards, make_config("data.max_length=999", "data.packing=none")).identity == one
    other = [
        changed("vision_model"),
        changed("connector"),
        make_config("model.dtype=bfloat16"),
        make_config("image.longest_edge=64"),
        make_config("model.train=[text,connector]"),
    ]
    assert len({one, *(features_sidecar(shards, config).identity for config in other)}) == 6
    moved = write_shards(str(tmp_path / "others"), some_rows()[::-1], rows_per_file=14)
    assert features_sidecar(moved, base).identity != one


def test_an_interrupted_writer_resumes_and_rewrites_a_torn_table(shards, make_config):
    config, manifest, device = make_config(), read_manifest(shards), torch.device("cpu")
    sidecar = features_sidecar(shards, config)
    first, second = names_of(shards)
    made = []

    def make(todo, limit=9):
        for number in todo[:limit]:
            FeatureWriter(sidecar, config, device).write(manifest.files[number].name)
            made.append(number)

    with pytest.raises(ShardError, match="lacks 1 of 2 tables"):
        complete(sidecar, manifest, lambda todo: make(todo, limit=1))
    assert made == [0] and not is_whole(sidecar, manifest) and unfinished(sidecar, manifest) == [1]
    untouched = Path(sidecar.uri, first).stat().st_mtime_ns
    complete(sidecar, manifest, make)
    assert made == [0, 1] and is_whole(sidecar, manifest) and Path(sidecar.uri, first).stat().st_mtime_ns == untouched
    whole = Path(sidecar.uri, second).read_bytes()
    Path(sidecar.uri, second).write_bytes(whole[:-9])
    assert not is_whole(sidecar, manifest)
    complete(sidecar, manifest, make)
    assert made == [0, 1, 1] and Path(sidecar.uri, second).read_bytes() == whole and is_whole(sidecar, manifest)


def test_a_failed_write_leaves_nothing_that_looks_whole(shards, make_config):
    sidecar, manifest = features_sidecar(shards, make_config()), read_manifest(shards)
    schema = pa.schema([("key", pa.string())])

    def tables():
        yield pa.table({"key": ["a"]}, schema=schema)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_table(sidecar, names_of(shards)[0], schema, tables())
    assert unfinished(sidecar, manifest) == [0, 1] and not list(Path(sidecar.uri).iterdir())


def test_a_damaged_manifest_is_refused_with_the_remedy(shards, make_config):
    config = make_config()
    uri = local_sidecars(shards, config).features
    whole = json.loads(Path(uri, "manifest.json").read_text())
    one, *others = whole["files"]
    records = [
        whole | {"identity": "0"},
        whole | {"schema_version": 0},
        whole | {"files": others},
        whole | {"files": [one | {"rows": 1}, *others]},
    ]
    for damaged in ("{", "[]", "{}", "", *map(json.dumps, records)):
        Path(uri, "manifest.json").write_text(damaged)
        with pytest.raises(ShardError, match=f"delete {uri} to have it made again"):
            local_sidecars(shards, config)


def test_a_bit_that_has_tipped_is_not_trained_on(shards, make_config):
    config = make_config()
    plan, sidecars = local_plan(shards, config), local_sidecars(shards, config)
    path = Path(sidecars.features, names_of(shards)[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc"):
        batches(shards, config, sidecars, plan)


def test_tables_of_other_rows_are_not_read(shards, make_config, tmp_path):
    config = make_config()
    plan, sidecars = local_plan(shards, config), local_sidecars(shards, config)
    first, second = names_of(shards)
    shutil.copy(Path(shards, second), Path(shards, first))
    with pytest.raises(ShardError, match="other rows than in"):
        batches(shards, config, sidecars, plan)


def test_features_of_one_kind_are_not_taken_for_another(shards, make_config):
    behind, before = make_config(), make_config("model.train=[text,connector]")
    batch = batches(shards, before, local_sidecars(shards, before))[0]
    for model in (drop_submodules(load_model(behind.model), frozen_prefix(behind)), load_model(behind.model)):
        with pytest.raises(ValueError, match="features of \\(64, 64\\) for each tile"):
            hidden_states(model, batch)


def names_of(folder):
    return tuple(f.name for f in read_manifest(folder).files)


def blind(path):
    """Overwrite the images of a shard, in the row groups they lie in."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(n) for n in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for table in groups:
            images = pa.array(
                [[b"nothing"] * len(row) for row in table["images"].to_pylist()], table.schema.field("images").type
            )
            writer.write_table(
                table.set_column(table.column_names.index("images"), table.schema.field("images"), images)
            )
