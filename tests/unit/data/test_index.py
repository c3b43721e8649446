"""The index knows what is left out and cut, and how long it is; it also makes data.max_length=auto a number."""

import io

import pytest
from PIL import Image

from smolray.config import DataConfig, ImageConfig, ModelConfig, RunConfig
from smolray.data.encode import cached_encoder
from smolray.data.index import LENGTH, add_lengths, fingerprint, index_shard
from smolray.data.max_length import chosen_length
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation
from smolray.data.shards import prepared_account, read_manifest, write_shards
from smolray.run.account import DataAccount
from tests.offline import asked, encoder_of, message, picture, shard_row
from tests.real import MODELS, real_processor

pytestmark = pytest.mark.seconds

WORDS = "word " * 300
ROWS = [
    shard_row([], asked("short?", "yes", 0)),
    shard_row([], asked("long answer?", WORDS, 0)),
    shard_row([], asked(WORDS, "long question", 0)),
    shard_row([picture(60, 60)], asked("what?", "a box"), asked("long?", WORDS, name="long")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(str(tmp_path_factory.mktemp("shards")), ROWS)


def indexed(folder, encoder):
    name = read_manifest(folder).files[0].name
    return index_shard(folder, name, 0, encoder)


def account(folder, encoder):
    return add_lengths(prepared_account(read_manifest(folder)), indexed(folder, encoder), encoder.max_length)


def test_what_is_too_long_is_counted_with_its_lengths(folder, processor):
    whole = indexed(folder, encoder_of(processor, max_length=8192))
    lengths = sorted(whole["length"].to_pylist())
    assert whole["length"] == whole["tokens"] and lengths[-3] > 256 > lengths[-4]
    found = account(folder, encoder_of(processor, max_length=256))
    assert (found.conversations, found.too_long, found.cut, found.untrained) == (5, 3, 0, 0)
    assert found.longest == tuple(lengths[:-4:-1]) and found.max_length == 256


def test_what_is_cut_is_counted_apart_from_what_is_left_out(folder, processor):
    found = account(folder, encoder_of(processor, max_length=256, overlong="truncate_text"))
    assert (found.cut, found.too_long) == (2, 1), "an answer may be cut; behind a long question none would be left"
    assert len(found.longest) == 3 and min(found.longest) > 256


def test_a_sequence_of_exactly_the_limit_is_neither(folder, processor):
    length = sorted(indexed(folder, encoder_of(processor, max_length=8192))["length"].to_pylist())[-1]
    for overlong in ("drop", "truncate_text"):
        found = account(folder, encoder_of(processor, max_length=length, overlong=overlong))
        assert (found.left_out, found.cut, found.longest) == (0, 0, ())


def test_an_index_of_an_older_version_still_counts(folder, processor):
    encoder = encoder_of(processor, max_length=256)
    older = indexed(folder, encoder).drop_columns([LENGTH.name])
    found = add_lengths(DataAccount("s", 5), older, 256)
    assert (found.too_long, found.longest) == (3, ())


def chosen(folder, processor, **train):
    config = RunConfig(data={"train": folder}, train=train)
    encoder = encoder_of(processor)
    return chosen_length([indexed(folder, encoder)], config, encoder.max_length)


def test_auto_is_the_usual_limit_where_the_data_fit_into_it(folder, processor):
    assert chosen(folder, processor) == 2048


def test_auto_grows_to_what_the_longest_conversation_takes(tmp_path, processor):
    long = [shard_row([], asked("long?", "word " * n, 0, name=str(n))) for n in (100, 1500)]
    folder = write_shards(str(tmp_path), long)
    length = max(indexed(folder, encoder_of(processor))["length"].to_pylist())
    assert 2048 < length <= 8192 and chosen(folder, processor) == 1 << (length - 1).bit_length()
    assert chosen(folder, processor, micro_batch_tokens=2500) == 2500, "a micro-batch must hold one sequence"


def test_auto_counts_one_ending_of_a_pair_not_both(tmp_path, processor):
    endings = [(message("assistant", word * 700),) for word in ("word ", "blue ")]
    pair = Conversation("pair", (message("user", "?"),), *endings)
    folder = write_shards(str(tmp_path), [shard_row([], pair)])
    index = indexed(folder, encoder_of(processor))
    assert index["tokens"][0].as_py() > 2048 > index["length"][0].as_py()
    assert chosen(folder, processor) == 2048


def test_auto_never_exceeds_the_context_of_the_model(tiny_path):
    data = DataConfig()
    assert cached_encoder(ModelConfig(path=tiny_path), data, ImageConfig()).max_length == 8192
    assert encoder_of(load_processor(ModelConfig(path=tiny_path)), max_length=9000).max_length == 9000


def test_the_fingerprint_of_a_length_is_that_of_versions_without_auto(processor):
    assert fingerprint(encoder_of(processor, max_length=8192)) == fingerprint(encoder_of(processor))


def blank(width, height, shade):
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [[(1240, 1754)] * 3, [(1280, 720)] * 2], ids=["three A4 pages", "two 720p frames"])
def test_ordinary_pages_are_kept_by_default(tmp_path, name, sizes):
    pages = [blank(*size, shade=n) for n, size in enumerate(sizes)]
    folder = write_shards(str(tmp_path / "shards"), [shard_row(pages, asked("what?", "pages", len(pages)))])
    model = ModelConfig(path=str(real_processor(name, tmp_path / "model")))
    encoder = cached_encoder(model, DataConfig(), ImageConfig(upscale=True))
    index = indexed(folder, encoder)
    config = RunConfig(model=model)
    length = chosen_length([index], config, encoder.max_length)
    assert 0 < index["tokens"][0].as_py() <= length
