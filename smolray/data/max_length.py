"""`data.max_length=auto` as a number: the shortest usual limit that no conversation of the data exceeds.

In: the indexes of a run's data, made with the longest limit. Out: the limit. Where no conversation is longer than the
least limit it is that one, so that the order of an epoch does not depend on how far the data stay below it.
"""

from collections.abc import Iterable

import pyarrow as pa

from smolray.config import AUTO_LENGTHS, RunConfig
from smolray.data.index import longest_kept


def chosen_length(indexes: Iterable[pa.Table], config: RunConfig, most: int) -> int:
    """The limit for these indexes. `most`: the limit that they were made with."""
    if config.data.max_length != "auto":
        return config.data.max_length
    longest = max(map(longest_kept, indexes), default=0)
    most = min(most, config.train.micro_batch_tokens or most)
    return max(min(AUTO_LENGTHS[0], most), min(most, 1 << (longest - 1).bit_length()))
