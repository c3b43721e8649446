"""YAML from anywhere is read within bounds: every hostile text ends in one short line, within a moment."""

import time

import pytest
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.config import ConfigError, load_config
from smolray.config.parse import YamlError, parse_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 10)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "aliases that stand for a billion values": (BOMB, "1,234,567,909 values"),
    "merged aliases": (
        "a: &a {x: 1}\n" + "b: &b {{<<: [{}]}}\nc: {{<<: [{}]}}".format(("*a," * 200)[:-1], ("*b," * 200)[:-1]),
        "values",
    ),
    "a list in itself": ("data: &a [*a]", "line 1 stands for a value that contains it"),
    "a section in itself": ("data: &d {train: x, columns: *d}", "contains it"),
    "deep and open": ("a: " + "[" * 5000, "nested too deep"),
    "deep and closed": ("a: " + "[" * 60 + "]" * 60, "nested too deep"),
    "deep sections": ("".join(" " * n + "a:\n" for n in range(60)), "nested too deep"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "4300 digits"),
    "a day that is none": ("name: 2024-13-45", "month"),
    "three megabytes": ("data: {train: %s}" % ("a" * 3_000_000), "characters"),
    "an object of Python": ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a key that is a list": ("? [a, b]\n: 1", "unhashable key"),
    "two documents": ("seed: 1\n---\nseed: 2", "single document"),
    "a tab": ("a:\n\t- b", "cannot start any token"),
    "a control character": ("a: \x00", "special characters"),
    "bytes that are none": ("data: {train: !!binary x}", "base64"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_file_ends_in_one_line_at_once(tmp_path, hostile):
    text, told = HOSTILE[hostile]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert told in message and str(file) in message and "\n" not in message and len(message) < 500


def test_the_command_prints_the_line_and_exits_with_2(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(BOMB)
    done = CliRunner().invoke(app, ["config", "show", "--config", str(file)])
    assert done.exit_code == 2 and "Traceback" not in done.output and len(done.output) < 400


@pytest.mark.parametrize("text", ["[" * 5000, "&a [*a]", "9" * 5000, "2024-13-45", BOMB])
def test_an_override_is_bounded_as_a_file_is(text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"train.max_steps={text}"])
    assert "train.max_steps" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_alias_that_is_used_a_few_times_is_read():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: &d {x: 1}, y: 2}\ne: *d") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"x": 1, "y": 2},
        "e": {"x": 1},
    }
    assert parse_yaml("") is None and parse_yaml("# nothing") is None


def test_a_key_of_several_lines_is_told_on_one():
    with pytest.raises(ConfigError) as caught:
        load_config(None, base={"a\nb": 1})
    assert "\n" not in str(caught.value)
    with pytest.raises(YamlError, match="nested too deep"):
        parse_yaml("[" * 51 + "]" * 51)
