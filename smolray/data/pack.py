"""Shared-image packing: all questions about one image in one sequence, with the same result as one by one.

In: the Encoded conversations of one row (both endings of each, for preference data). Out: one Packed sequence. It holds
their common prefix (the same tokens, and the same images because they are of one row) once, then the rest of each
conversation as a branch, which sees the prefix and itself. The position ids of every branch continue from the prefix,
so each token has exactly the context that it would have alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smolray.data.encode import Encoded


@dataclass(frozen=True)
class Packed:
    """One sequence. `branch`: 0 for the prefix, 1.. for the branches.

    `targets` are (position whose hidden state predicts, token id) pairs: a position may predict several tokens (the
    last one of a prefix predicts the first of each branch). `ends`: the last position of each conversation, from which
    decoding continues.
    """

    input_ids: np.ndarray  # (length,) int32
    position_ids: np.ndarray  # (length,) int32
    branch: np.ndarray  # (length,) int32
    target_positions: np.ndarray  # (targets,) int32
    target_ids: np.ndarray  # (targets,) int32
    target_branch: np.ndarray  # (targets,) int32: 0.. the branch that trains the token
    ends: np.ndarray  # (conversations,) int32


def common_prefix(encoded: Sequence[Encoded]) -> int:
    """The length of the prefix: the tokens that all share and none trains. It is 0 for a single conversation."""
    if len(encoded) < 2:
        return 0

    first = encoded[0]
    shared = min(_first_trained(e) for e in encoded)
    for other in encoded[1:]:
        n = min(shared, len(other.input_ids), len(first.input_ids))
        differs = np.flatnonzero(first.input_ids[:n] != other.input_ids[:n])
        shared = int(differs[0]) if len(differs) else n
    return shared


def pack(encoded: Sequence[Encoded]) -> Packed:
    """Pack the conversations of one row, at least one, into one sequence."""
    prefix = common_prefix(encoded)
    ids, positions, branches, target_positions, target_ids, target_branch, ends = [], [], [], [], [], [], []

    if prefix:
        ids.append(encoded[0].input_ids[:prefix])
        positions.append(np.arange(prefix, dtype=np.int32))
        branches.append(np.zeros(prefix, np.int32))

    offset = prefix
    for number, one in enumerate(encoded, start=1):
        rest = len(one.input_ids) - prefix
        ids.append(one.input_ids[prefix:])
        positions.append(np.arange(prefix, prefix + rest, dtype=np.int32))
        branches.append(np.full(rest, number if len(encoded) > 1 else 0, np.int32))

        trained = np.flatnonzero(one.trained[1:]) + 1
        before = trained - 1

        target_positions.append(np.where(before < prefix, before, before - prefix + offset))
        target_ids.append(one.input_ids[trained])
        target_branch.append(np.full(len(trained), number - 1, np.int32))

        ends.append(offset + rest - 1 if rest else prefix - 1)
        offset += rest

    return Packed(
        np.concatenate(ids),
        np.concatenate(positions),
        np.concatenate(branches),
        np.concatenate(target_positions).astype(np.int32),
        np.concatenate(target_ids),
        np.concatenate(target_branch),
        np.array(ends, np.int32),
    )


def pack_sides(texts: Sequence[Encoded], images: Sequence[Encoded]) -> Packed:
    """Pack texts and images that must not see each other, for contrastive training, into one sequence.

    Each of `texts` is a branch; the result of `pack` for `images` follows. No text sees an image or another text, and
    no image sees a text: only the images share the prefix. Nothing of `texts` is trained.
    """
    packed, lengths = pack(images), [len(one.input_ids) for one in texts]
    offset = sum(lengths)

    positions = [np.arange(length, dtype=np.int32) for length in lengths]
    return Packed(
        np.concatenate([*(one.input_ids for one in texts), packed.input_ids]),
        np.concatenate([*positions, packed.position_ids]),
        np.concatenate(
            [
                np.repeat(np.arange(1, len(texts) + 1, dtype=np.int32), lengths),
                np.where(packed.branch, packed.branch + len(texts), 0),
            ]
        ),
        packed.target_positions + offset,
        packed.target_ids,
        packed.target_branch + len(texts),
        np.concatenate([np.cumsum(lengths) - 1, packed.ends + offset]).astype(np.int32),
    )


def _first_trained(encoded: Encoded) -> int:
    trained = np.flatnonzero(encoded.trained)
    return int(trained[0]) if len(trained) else len(encoded.input_ids)
