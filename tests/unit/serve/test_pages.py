"""The cache's bookkeeping: no page has two contents, none is lost, and what is used is never given away."""

import random

from smolray.serve.pages import SCRATCH, PagePool


def chain(name, count):
    return [f"{name}-{n}".encode() for n in range(count)]


def test_pages_of_a_known_beginning_are_shared_and_kept_until_their_place_is_needed():
    pool = PagePool(6)
    first = pool.take(3)
    for page, key in zip(first, chain("a", 3), strict=True):
        pool.publish(page, key)
    assert pool.share(chain("a", 3)) == first and pool.share([*chain("a", 2), b"other"]) == first[:2]
    for used in (first, first, first[:2]):
        pool.release(used)
    assert pool.available == 6 and pool.share(chain("a", 3)) == first, "nobody uses them, and they still hold it"
    pool.release(first)
    taken = pool.take(5)
    assert pool.share(chain("a", 3)) == first[:1] and first[0] not in taken, "the end of a beginning goes first"


def test_no_page_is_lost_or_given_twice_whatever_comes_and_goes():
    rng, pool, held = random.Random(0), PagePool(40), []
    for turn in range(3000):
        if rng.random() < 0.5 and held:
            pool.release(held.pop(rng.randrange(len(held)))[0])
        else:
            keys = chain(rng.choice("abc"), rng.randint(0, 4)) + chain(f"own{turn}", rng.randint(0, 2))
            shared = pool.share(keys)
            count = len(keys) - len(shared) + rng.randint(0, 3)
            if count > pool.available:
                pool.release(shared)
                continue
            pages = shared + pool.take(count)
            for page, key in zip(pages, keys, strict=False):
                pool.publish(page, key)
            held.append((pages, len(shared)))
        used = {page for pages, _ in held for page in pages}
        assert SCRATCH not in used and pool.available == 40 - len(used)
        own = [page for pages, shared in held for page in pages[shared:]]
        assert len(own) == len(set(own)), "new content never goes where another's is"
    while held:
        pool.release(held.pop()[0])
    assert pool.available == 40
