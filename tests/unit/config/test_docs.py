"""The page of settings says what the schema says."""

from smolray.config import RunConfig, docs
from smolray.config.schema import RENAMED


def test_settings_page_equals_the_schema():
    written = docs.PATH.read_text(encoding="utf-8")
    assert written == docs.settings_page(), f"smolray/config/README.md is out of date; run: {docs.COMMAND}"


def test_every_setting_has_a_meaning():
    schema = RunConfig.model_json_schema()
    sections = {"RunConfig": schema, **{name: part for name, part in schema["$defs"].items() if "properties" in part}}
    silent = [
        f"{section}.{key}"
        for section, part in sections.items()
        for key, value in part["properties"].items()
        if "description" not in value and "$ref" not in str(value)
    ]
    assert not silent, "write a docstring below these settings in smolray/config/schema.py"


def test_settings_page_names_every_key_of_a_run():
    page = docs.settings_page()
    for section, settings in RunConfig(lora={}, search={}).model_dump().items():
        keys = [f"{section}.{key}" for key in settings] if isinstance(settings, dict) else [section]
        missing = [key for key in keys if f"`{key}`" not in page and f"### {key}\n" not in page]
        assert not missing


def test_settings_page_names_renamed_settings():
    page = docs.settings_page()
    assert all(f"`{old}` is now `{new}`" in page for old, new in RENAMED.items())


def test_lines_are_short_enough_to_read():
    assert max(map(len, docs.settings_page().splitlines())) <= docs.WIDTH
