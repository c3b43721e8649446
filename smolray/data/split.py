"""Which conversations are held out for validation: whole groups of images that no row links with another group.

In: for each conversation, its order key and its images. Out: the two Parts of the rows. The choice depends on the
data, the seed and the fraction alone.
"""

from dataclasses import dataclass

import numpy as np

from smolray.data.formats.source import SourceError

# One record for each image of each conversation. `order`: the order key of its row; `first`: 1 for the first of a
# conversation. A conversation without an image has one record, with a hash of its text.
PICTURE_DTYPE = np.dtype([("order", "u8"), ("picture", "u8"), ("first", "u1")])


@dataclass(frozen=True)
class Part:
    """The rows with one of these order keys, or without (`inside` false); None: all. `share`: of the conversations."""

    orders: np.ndarray | None = None
    inside: bool = True
    share: float = 1.0

    def holds(self, order: int) -> bool:
        """Whether the rows of an order key belong to it."""
        if self.orders is None:
            return True
        at = np.searchsorted(self.orders, np.uint64(order))
        return bool(at < len(self.orders) and self.orders[at] == np.uint64(order)) == self.inside


WHOLE = Part()


def hold_out(records: np.ndarray, fraction: float) -> tuple[Part, Part]:
    """What is held out, about `fraction` of the conversations, and the rest.

    Images that one row holds together are on the same side, and so is everything that hangs together by such rows.

    Args:
        records: (n,) of PICTURE_DTYPE.
        fraction: above 0, below 1.

    Raises:
        SourceError: rows link all images into one group, so that none can be held out.
    """
    pictures, picture = np.unique(records["picture"], return_inverse=True)
    group = _groups(records["order"], picture, len(pictures))[picture]
    sizes = np.bincount(group, weights=records["first"], minlength=len(pictures)).astype(np.int64)
    chosen = _choose(sizes, fraction)
    orders, share = np.unique(records["order"][chosen[group]]), float(sizes[chosen].sum() / sizes.sum())
    return Part(orders, True, share), Part(orders, False, 1 - share)


def _choose(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which groups are held out: (groups,) bool. Each that still fits is taken, in their order."""
    total = int(sizes.sum())
    present = np.flatnonzero(sizes)
    if len(present) < 2:
        raise SourceError(
            f"data.validation_fraction = {fraction}: all {total:,} conversations are about one image, or about "
            "images that hang together by rows with several of them; name validation data with data.validation"
        )

    left = max(1, round(fraction * total))
    chosen = np.zeros(len(sizes), bool)
    for number in present.tolist():
        if sizes[number] <= left:
            chosen[number] = True
            left -= int(sizes[number])
        if not left:
            break
    if not chosen.any():
        chosen[present[np.argmin(sizes[present])]] = True
    return chosen


def _groups(orders: np.ndarray, picture: np.ndarray, pictures: int) -> np.ndarray:
    """The group of each image, by its smallest image: (pictures,) int64."""
    parent = np.arange(pictures)
    by_order = np.argsort(orders, kind="stable")
    same_row = orders[by_order][1:] == orders[by_order][:-1]
    links = np.stack([picture[by_order][:-1][same_row], picture[by_order][1:][same_row]], axis=1)
    links = np.unique(links[links[:, 0] != links[:, 1]], axis=0)

    for pair in links.tolist():
        a, b = (_root(parent, one) for one in pair)
        parent[max(a, b)] = min(a, b)
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return parent


def _root(parent: np.ndarray, number: int) -> int:
    while (above := int(parent[number])) != number:
        parent[number] = parent[above]
        number = above
    return number
