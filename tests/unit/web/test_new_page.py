"""A new run is filled in, checked as the command line checks it, looked at, and only then started."""

import re

import pytest
import yaml
from markupsafe import escape

from smolray.config import RunConfig, load_config
from smolray.config.docs import all_settings
from smolray.web.settings_form import form_sections, overrides_of
from tests.webpages import EVIL, Browser, site_of


@pytest.fixture
def site(tmp_path):
    (tmp_path / "runs").mkdir()
    return site_of(tmp_path / "runs")


def test_every_setting_has_a_field_with_its_meaning(site):
    text = Browser(site).get("/new").text
    offered = set(re.findall(r'name="([\w.]+)"', text))
    known = {setting.key for setting in all_settings()}
    assert {"optimizer.learning_rate", "lora.r", "data.columns.question", "engine.stage"} <= known
    left_out = {key for key in known - offered if not key.startswith("search.")}
    assert left_out == {"storage", "callbacks", "notify"}
    assert str(escape(RunConfig.model_fields["seed"].description)) in " ".join(text.split())


def test_only_what_was_filled_in_is_an_override():
    fields = {"name": "mine", "lora.r": " 8 ", "seed": "", "storage": "/elsewhere", "token": "x", "unknown": "1"}
    assert overrides_of(fields) == ["name=mine", "lora.r=8"]
    assert [(s.title, s.filled) for s in form_sections(fields) if s.filled] == [("", 1), ("lora", 1)]


def test_a_fault_is_told_as_by_the_command_line_and_nothing_is_lost(site):
    browser = Browser(site)
    answer = browser.post("/new", page="/new", **{"name": "My Run", "data.train": EVIL, "optimizer.learning_rate": "x"})
    assert answer.status_code == 422 and "nearest: my-run" in answer.text.replace("&#39;", "'")
    assert 'value="My Run"' in answer.text and "<script>alert" not in answer.text
    assert "data.train is empty" in browser.post("/new", page="/new", name="mine").text
    for name in ("../../etc/passwd", "runs/x.yaml"):
        assert browser.get(f"/new?recipe={name}").status_code == 409
        assert "no recipe" in browser.post("/new", page="/new", recipe=name, name="mine").text


def test_a_draft_shows_its_command_settings_and_data_before_it_is_started(site, tmp_path):
    browser = Browser(site)
    fields = {"name": "mine", "data.train": str(tmp_path / "none.parquet"), "optimizer.learning_rate": "3e-5"}
    answer = browser.post("/new", page="/new", recipe="vqa_lora", **fields)
    path = answer.headers["location"]
    assert answer.status_code == 303 and path.startswith("/new/")
    text = browser.get(path).text
    assert "smolray train --config vqa_lora name=mine data.train=" in text and "not started" in text
    assert "no plan" in text.lower() or "No GPUs to plan for" in text
    shown = yaml.safe_load(
        re.search(r"<h2>Settings that are not the default</h2>\s*<pre[^>]*>(.*?)</pre>", text, re.S)[1]
    )
    config = load_config("vqa_lora", [*(f"{k}={v}" for k, v in fields.items()), f"storage={site.root}"])
    assert RunConfig.model_validate(shown) == config
    started = site.processes.of(site.drafts.find(path.split("/")[-1]).job)
    assert [one.command for one in started] == ["preview"]
    started[0].process.kill()
    assert 'value="3e-5"' in browser.get(f"/new?draft={path.split('/')[-1]}").text
    assert browser.get("/new/other").status_code == 404 and not list((tmp_path / "runs").iterdir())
