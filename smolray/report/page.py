"""HTML from Jinja2 templates, with all text escaped.

In: a template's name and its values. Out: markup. A page contains its style sheet and its charts. It fetches nothing
and runs no script, so it opens from a disk, a mail or a bucket.
"""

from functools import lru_cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PACKAGE = "smolray.report"


def render(template: str, package: str = PACKAGE, **values: Any) -> Markup:
    """The markup of `<package>/templates/<template>`.

    Templates of other packages may extend and include those of this one. Text in `values` is escaped; Markup, such as a
    chart, is inserted as it is.
    """
    return Markup(_environment(package).get_template(template).render(values))  # noqa: S704  (it was escaped)


@lru_cache
def _environment(package: str) -> Environment:
    packages = dict.fromkeys((package, PACKAGE))
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
