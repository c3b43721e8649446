"""Runs before they are started: what was filled in, and the settings that follow.

In: the fields of a form. Out: a Draft, found again by its id. Drafts end with the process of the pages.
"""

import secrets
from collections import OrderedDict
from dataclasses import dataclass

from smolray.config import RunConfig
from smolray.web.files import NotFoundError
from smolray.web.settings_form import overrides_of

MOST_DRAFTS = 200


@dataclass(frozen=True)
class Draft:
    """A run before it is started. `fields`: of the form."""

    id: str
    recipe: str
    fields: dict[str, str]
    config: RunConfig

    @property
    def arguments(self) -> list[str]:
        """The words of `smolray train`."""
        given = [*overrides_of(self.fields), f"storage={self.config.storage}"]
        return ["--config", self.recipe, *given] if self.recipe else given

    @property
    def job(self) -> str:
        """The name of the commands that look at it."""
        return f"draft {self.id}"


class Drafts:
    """The drafts of these pages, the newest last."""

    def __init__(self) -> None:
        self._drafts: OrderedDict[str, Draft] = OrderedDict()

    def keep(self, recipe: str, fields: dict[str, str], config: RunConfig) -> Draft:
        """Keep the fields of a form that was checked."""
        draft = Draft(secrets.token_urlsafe(9), recipe, fields, config)
        self._drafts[draft.id] = draft
        while len(self._drafts) > MOST_DRAFTS:
            self._drafts.popitem(last=False)
        return draft

    def find(self, name: str) -> Draft:
        """Raises NotFoundError."""
        if name not in self._drafts:
            raise NotFoundError("this draft is gone: the pages were started anew; fill in the form again")
        return self._drafts[name]
