"""Lengths are those of the index, and what is left out is counted."""

import numpy as np

from smolray.cli.preview_lengths import lengths_table
from smolray.data.encode import cached_encoder
from smolray.data.index import index_uri, write_index
from smolray.data.local import local_index
from tests.previews import config_of, lengths_of, printed
from tests.shards import vqa_rows, write_shards


def test_lengths_are_those_of_the_index_whole_or_the_first_shard(tmp_path, model_path):
    folder = write_shards(str(tmp_path), vqa_rows("train", 20), rows_per_file=10)
    config = config_of(model_path, folder)
    index = local_index(folder, config)
    part = lengths_of(config)
    assert part.sample and 0 < len(part.tokens) < len(index) and "first shard" in printed(lengths_table(part))
    write_index(index_uri(folder, cached_encoder(config.model, config.data, config.image)), index)
    whole = lengths_of(config)
    assert whole.sample == "" and whole.rows == whole.tiles == 20 and whole.account.left_out == 0
    np.testing.assert_array_equal(whole.tokens, index["tokens"].to_numpy())
    assert whole.label_tokens == sum(index["label_tokens"].to_pylist()) and 0 <= whole.padding < 0.6
    lines = printed(lengths_table(whole)).splitlines()
    counts = [int(line.split("█")[0].split()[-1].replace(",", "")) for line in lines if "█" in line]
    assert sum(counts) == len(index) and f"longest {whole.tokens.max()}" in "".join(lines)


def test_what_is_left_out_is_counted(shards, model_path):
    summary = lengths_of(config_of(model_path, shards))
    assert summary.account.left_out == 1 and len(summary.tokens) == 5
    assert "left out 1" in "".join(summary.account.lines("train"))
