"""The settings of a run as a form, from the schema: one field a setting, with its meaning, type and default.

In: the fields that were filled in. Out: the sections of the form, and `key=value` as the command line takes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from smolray.config.docs import Setting, all_settings

FIRST = ("name", "data.train", "data.validation", "model.path", "train.num_train_epochs", "resources.num_workers")
# The storage is that of the pages; a search is started by `smolray tune`; callbacks are code; an address of notify
# takes what it names from the environment, and would send it there.
LEFT_OUT = ("storage", "callbacks", "notify", "search.")


@dataclass(frozen=True)
class FormSection:
    """Settings that stand together."""

    title: str
    settings: list[Setting]
    filled: int


def form_sections(fields: Mapping[str, str]) -> list[FormSection]:
    """The settings that most runs change, then all others by section."""
    known = {setting.key: setting for setting in all_settings() if not setting.key.startswith(LEFT_OUT)}
    sections: dict[str, list[Setting]] = {"": [known[key] for key in FIRST]}
    for key, setting in known.items():
        if key not in FIRST:
            sections.setdefault(key.rpartition(".")[0] or "the run itself", []).append(setting)
    return [
        FormSection(title, settings, sum(bool(fields.get(s.key, "").strip()) for s in settings))
        for title, settings in sections.items()
    ]


def overrides_of(fields: Mapping[str, str]) -> list[str]:
    """`key=value` of the fields that were filled in, in the order of the settings."""
    keys = (setting.key for section in form_sections(fields) for setting in section.settings)
    return [f"{key}={value}" for key in keys if (value := fields.get(key, "").strip())]
