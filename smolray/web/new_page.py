"""The pages of a new run: a form of all settings; then what it would train and how it fits, and the button to start it.

In: a recipe and settings. Out: the checked settings as YAML and as a command; `smolray preview` and `smolray plan` of
them, which run in processes of their own; a run that was started.
"""

import shlex
from typing import Any

import yaml
from fastapi.responses import RedirectResponse, Response

from smolray.config import ConfigError, RunConfig, load_config
from smolray.config.recipes import recipes
from smolray.run.folder import RunFolder
from smolray.web.drafts import Draft
from smolray.web.live import Part, stream
from smolray.web.settings_form import form_sections, overrides_of
from smolray.web.site import Ask, Site, fragment, page, run_path

SAMPLES = 3  # in the preview


def form(ask: Ask) -> Response:
    """GET /new?recipe=NAME, or ?draft=ID to change one."""
    if ask.given("draft"):
        draft = ask.site.drafts.find(ask.given("draft"))
        return _form(ask, draft.recipe, draft.fields)
    return _form(ask, ask.given("recipe"), {})


def check(ask: Ask) -> Response:
    """POST /new: check the settings, and begin to look at the data and the GPUs."""
    recipe, fields = ask.form.get("recipe", ""), {k: v for k, v in ask.form.items() if k != "token"}
    try:
        config = load_config(_known_recipe(recipe) or None, [*overrides_of(fields), f"storage={ask.site.root}"])
        if not config.data.train:
            raise ConfigError("data.train is empty; name a file, a folder or a data set to train on")
    except ConfigError as error:
        return _form(ask, recipe, fields, str(error))

    draft = ask.site.drafts.keep(recipe, fields, config)
    _look(ask.site, draft)
    return RedirectResponse(f"/new/{draft.id}", 303)


def show(ask: Ask) -> Response:
    """GET /new/ID."""
    draft = ask.site.drafts.find(ask.name)
    parts = {part.id: part for part in read_parts(ask.site, draft)}
    command = "submit --address " + ask.site.address if ask.site.address else "train"
    return page(
        ask,
        "draft.html",
        f"New run {draft.config.name}",
        draft=draft,
        parts=parts,
        exists=RunFolder(draft.config.run_dir).is_run(),
        command=f"smolray {command} {shlex.join(draft.arguments)}",
        settings=changed_settings(draft.config),
    )


def live(ask: Ask) -> Response:
    """GET /new/ID/live."""
    draft = ask.site.drafts.find(ask.name)
    return stream(ask, lambda: read_parts(ask.site, draft))


def start(ask: Ask) -> Response:
    """POST /new/ID/start."""
    draft, site = ask.site.drafts.find(ask.name), ask.site
    words = ["submit", "--address", site.address] if site.address else ["train"]
    site.processes.start(draft.config.name, [*words, *draft.arguments])
    return RedirectResponse(run_path(draft.config.name), 303)


def read_parts(site: Site, draft: Draft) -> list[Part]:
    """What the commands that look at the draft have printed so far."""
    started = {one.command: one for one in site.processes.of(draft.job)}
    return [Part(name, fragment("draft_look.html", started=started.get(name))) for name in ("preview", "plan")]


def changed_settings(config: RunConfig) -> str:
    """The settings that differ from the defaults, as YAML."""
    return yaml.safe_dump(
        _changed(config.model_dump(mode="json"), RunConfig().model_dump(mode="json")), sort_keys=False
    )


def _changed(record: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        usual = default.get(key)
        if isinstance(value, dict) and isinstance(usual, dict):
            value, usual = _changed(value, usual), {}
        if value != usual:
            found[key] = value
    return found


def _look(site: Site, draft: Draft) -> None:
    """Start what shows the data and the plan, beside each other."""
    site.processes.start(draft.job, ["preview", "--count", str(SAMPLES), *draft.arguments], shown=True)
    if inventory := draft.fields.get("inventory", "").strip():
        site.processes.start(draft.job, ["plan", "--inventory", inventory, *draft.arguments], shown=True)


def _form(ask: Ask, recipe: str, fields: dict[str, str], fault: str = "") -> Response:
    return page(
        ask,
        "new.html",
        "New run",
        422 if fault else 200,
        recipes=recipes(),
        recipe=_known_recipe(recipe),
        settings_of_recipe=changed_settings(load_config(recipe)) if _known_recipe(recipe) else "",
        sections=form_sections(fields),
        fields=fields,
        fault=fault,
    )


def _known_recipe(name: str) -> str:
    """Raises ConfigError for one that does not exist: a name is no path."""
    if name and name not in recipes():
        raise ConfigError(f"no recipe is called {name[:50]!r}; recipes: {', '.join(recipes())}")
    return name
