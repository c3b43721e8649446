"""The page Search: searches for hyperparameters, with their trials, settings and learning curves.

In: how searches are read, which the command line hands over (smolray/tune). Out: the list, and one search, live.
"""

from fastapi.responses import Response

from smolray import storage
from smolray.web.files import NotFoundError, is_inside
from smolray.web.live import Part, stream
from smolray.web.site import Ask, page


def show(ask: Ask) -> Response:
    """GET /searches."""
    return page(ask, "searches.html", "Search", names=ask.site.searches.names(ask.site.root))


def show_one(ask: Ask) -> Response:
    """GET /searches/NAME."""
    return page(ask, "one_search.html", ask.name, name=ask.name, parts={"search": _part(ask)})


def live(ask: Ask) -> Response:
    """GET /searches/NAME/live."""
    _part(ask)
    return stream(ask, lambda: [_part(ask)])


def _part(ask: Ask) -> Part:
    searches = ask.site.searches
    folder = storage.join(ask.site.root, ask.name)
    if ask.name not in searches.names(ask.site.root) or not is_inside(ask.site.root, folder):
        raise NotFoundError(f"there is no search {ask.name[:100]!r} here")
    return Part("search", str(searches.report(folder)))
