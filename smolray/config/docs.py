"""Every setting as Markdown: `python -m smolray.config.docs` writes README.md next to this file.

In: the JSON schema of RunConfig. Out: one list of settings for each section. A test compares the file with the schema.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolray.config.schema import ALIASES, RENAMED, SHORTHANDS, RunConfig

PATH = Path(__file__).with_name("README.md")
WIDTH = 120
COMMAND = "python -m smolray.config.docs"

INTRODUCTION = f"""\
<!-- Written by `{COMMAND}` from smolray/config/schema.py. Change the schema, then run it again. -->

# Settings

A run is one YAML file, and dotted `key=value` pairs on the command line that override it:

```yaml
name: my-run
data:
  train: /data/vqa.parquet
optimizer:
  learning_rate: 5.0e-5
```

`smolray train run.yaml optimizer.learning_rate=1e-4` trains it with another learning rate; `--config run.yaml` and
`--optimizer.learning_rate 1e-4` are the same.
`smolray config show` prints every setting of a run after both were read. `smolray config schema` prints the JSON schema
for an editor. Names are those of TRL and transformers where these have one.

Wrong keys, values and combinations are refused in one message. It names the key, the value, what is allowed and the
nearest valid choice.
"""


def settings_page() -> str:
    """The whole page: the settings of the run itself first, then one heading for each section of the YAML file."""
    schema = RunConfig.model_json_schema()
    own, sections = _split(schema, schema["$defs"])

    blocks = [INTRODUCTION, "## The run itself\n", _entries("", own, schema["$defs"])]
    for name, section in sections.items():
        blocks += [f"## {name}\n", *_section(name, section, schema["$defs"])]
    blocks += ["## Renamed settings\n", _renamed(), "## Names of TRL\n", _aliases()]
    return "\n".join(blocks)


@dataclass(frozen=True)
class Setting:
    """One setting in words. `choices`: its values, where they are a list of words."""

    key: str
    kind: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


def all_settings() -> list[Setting]:
    """Every setting by its dotted key, in the order of the schema."""
    schema = RunConfig.model_json_schema()
    return list(_settings("", schema, schema["$defs"]))


def _settings(prefix: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[Setting]:
    own, inner = _split(section, definitions)
    for name, value in own.items():
        meaning = " ".join(value.get("description", "").split())
        kind, default = _type(value, definitions), _default(value).strip("`")
        choices = ("true", "false") if value.get("type") == "boolean" else tuple(value.get("enum", ()))
        yield Setting(prefix + name, kind.replace("`", ""), default, meaning, choices)
    for name, value in inner.items():
        yield from _settings(f"{prefix}{name}.", definitions[_reference(value, definitions) or ""], definitions)


def write() -> None:
    """Write the page to `PATH`."""
    PATH.write_text(settings_page(), encoding="utf-8")


def _split(section: dict[str, Any], definitions: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a section, and the sections inside it."""
    own: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    for name, value in section["properties"].items():
        (sections if _reference(value, definitions) else own)[name] = value
    return own, sections


def _reference(value: dict[str, Any], definitions: dict[str, Any]) -> str | None:
    """The name of the section that a property refers to, or None where it is a plain setting."""
    for part in (value, *value.get("anyOf", ()), *value.get("allOf", ())):
        name = part.get("$ref", "").rpartition("/")[2]
        if "properties" in definitions.get(name, {}):
            return name
    return None


def _item(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that an item of a list is, or None where the property is no list of sections."""
    for part in (value, *value.get("anyOf", ())):
        if _reference(part.get("items", {}), definitions):
            return dict(part["items"])
    return None


def _section(name: str, value: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    definition = definitions[_reference(value, definitions) or ""]
    own, inner = _split(definition, definitions)

    about = [text for text in (value.get("description"), definition.get("description")) if text]
    if value.get("default", {}) is None:
        about.append("Left out by default.")
    if name in SHORTHANDS:
        about.append(f"`{name}: X` is short for `{name}.{SHORTHANDS[name]}: X`.")

    blocks = [_wrapped(" ".join(_sentence(text) for text in about)) + "\n"] if about else []
    blocks.append(_entries(f"{name}.", own, definitions))
    for key, value_of in own.items():
        if item := _item(value_of, definitions):
            named = definitions[_reference(item, definitions) or ""]
            blocks += [f"### One of {name}.{key}\n", _wrapped(_sentence(named["description"])) + "\n"]
            blocks.append(_entries(f"{name}.{key}[n].", named["properties"], definitions))
    for key, nested in inner.items():
        blocks += [f"### {name}.{key}\n", *_section(f"{name}.{key}", nested, definitions)]
    return blocks


def _entries(prefix: str, properties: dict[str, Any], definitions: dict[str, Any]) -> str:
    return "".join(_entry(prefix + key, value, definitions) + "\n" for key, value in properties.items())


def _entry(key: str, value: dict[str, Any], definitions: dict[str, Any]) -> str:
    meaning = " ".join(value.get("description", "").split())
    head = f"- **`{key}`** ({_type(value, definitions)}; default {_default(value)})"
    return _wrapped(f"{head}: {meaning}" if meaning else head, "  ")


def _type(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The type in words, such as `integer >= 1` or `list of strings`."""
    if _reference(value, definitions) and "$ref" in value:
        return "section"
    if "$ref" in value:
        return _type(definitions[value["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in value:
        return " or ".join(_type(part, definitions) for part in value["anyOf"])
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])

    kind = value.get("type")
    if kind == "array" and "prefixItems" in value:
        return "[" + ", ".join(_type(part, definitions) for part in value["prefixItems"]) + "]"
    if kind == "array":
        item = _type(value["items"], definitions).replace("section", "sections")
        return f"list of ({item})" if "," in item else f"list of {item}"
    if kind == "object":
        names, values = value.get("propertyNames"), value.get("additionalProperties")
        keys = f"({_type(names, definitions)})" if names else "name"
        return f"map from {keys} to {_type(values, definitions) if isinstance(values, dict) else 'any value'}"
    words = {"null": "null", "boolean": "true or false", "string": "text", None: "any value"}
    return " ".join([words.get(kind, str(kind)), *_limits(value)])


def _limits(value: dict[str, Any]) -> list[str]:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    pattern = [f"matching `{value['pattern']}`"] if "pattern" in value else []
    return [" and ".join(found)] * bool(found) + pattern


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if "default" not in value and value.get("type") != "object":
        return "none, it must be given"
    if default is None:
        return "empty" if value.get("type") == "object" else "null"
    if default in ("", [], {}):
        return "empty"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _renamed() -> str:
    lines = [f"- `{old}` is now `{new}`." for old, new in RENAMED.items()]
    return "\n".join(["Files with the earlier names still work:\n", *lines]) + "\n"


def _aliases() -> str:
    lines = [f"- `{alias}` is `{key}`." for alias, key in ALIASES.items()]
    about = "Taken at the top of a file and on the command line; `smolray config import` reads whole files:\n"
    return "\n".join([about, *lines]) + "\n"


def _sentence(text: str) -> str:
    text = " ".join(text.split()).removesuffix(".")
    return f"{text[:1].upper()}{text[1:]}."


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    write()
