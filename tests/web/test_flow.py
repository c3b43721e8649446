"""A person in front of the pages, from the data to an answer of the trained model, with real runs over Ray: prepare,
look, plan, start, watch, stop, resume, compare, export, try. The pages are killed in mid-run.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from jobs.easyvqa import export_easy_vqa
from smolray.run.events import read_events
from smolray.run.status import run_status
from smolray.serve.keys import add_key
from tests.browser import chromium, log_in
from tests.offline import picture
from tests.ray_head import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PATIENCE = 600_000  # ms
STEPS = 150
CURVE = "document.querySelector('#charts polyline')?.getAttribute('points')"
SETTINGS = {  # by the section of the form
    "model": {"model.dtype": "float32"},
    "train": {"train.max_steps": STEPS, "train.per_device_train_batch_size": 4},
    "checkpoint": {"checkpoint.save_steps": 10},
    "evaluate": {"evaluate.max_samples": 24, "evaluate.max_new_tokens": 3},
    "resources": {"resources.use_gpu": "no", "resources.cpus_per_worker": 0.5},
}


class Machine:
    """Commands as a person types them, in a home of their own, on a Ray that is there."""

    def __init__(self, folder, ray_address):
        self.folder, self.root, self.keys = folder, folder / "runs", folder / "keys.json"
        ports = {"PYTHONPATH": os.getcwd(), "HOME": str(folder), "SMOLRAY_KEY_FILE": str(self.keys)}
        token = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")  # of this Ray
        ray = {"RAY_ADDRESS": ray_address, "RAY_AUTH_TOKEN_PATH": token}
        self.environment = os.environ | ports | ray | {"SMOLRAY_STORAGE": str(self.root)}

    def start(self, *words):
        """A `smolray` command that goes on."""
        with (self.folder / f"{words[0]}.txt").open("ab") as said:
            command = [sys.executable, "-m", "smolray", *map(str, words)]
            return subprocess.Popen(command, env=self.environment, stdout=said, stderr=said, start_new_session=True)

    def settings(self, name):
        """Of a run, by the section of the form."""
        data = {"data.train": self.folder / "train.parquet", "data.validation": self.folder / "test.parquet"}
        first = {"name": name, **data, "model.path": "tiny", "resources.num_workers": 1}
        return {"": first} | SETTINGS

    def said(self, command):
        return (self.folder / f"{command}.txt").read_text()[-3000:]

    def wait_for(self, true, *commands, seconds=600):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, [self.said(command) for command in commands]
            time.sleep(0.2)

    def answers(self, address):
        try:
            return requests.get(address, timeout=5).status_code < 500
        except requests.RequestException:
            return False

    def end(self):
        """Kill what was started here, and what that has started."""
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("SMOLRAY_KEY_FILE") == str(self.keys):
                process.kill()


@contextmanager
def machine(folder, ray_address):
    one = Machine(folder, ray_address)
    try:
        yield one
    finally:
        one.end()


def steps_of(run_dir):
    return [event["step"] for event in read_events(str(run_dir)) if event["event"] == "step"]


def fill_in(page, machine, name):
    """The form of a new run."""
    page.get_by_role("link", name="New run").click()
    page.get_by_label("GPUs to plan for").fill("1x rtx4090")
    for section, settings in machine.settings(name).items():
        if section:
            page.locator("summary", has_text=re.compile(rf"^{section}$")).click()
        for key, value in settings.items():
            field = page.get_by_label(key, exact=True)
            field.select_option(str(value)) if field.evaluate("e => e.tagName") == "SELECT" else field.fill(str(value))


class Person:
    """Somebody in front of the pages of a machine, with a key."""

    def __init__(self, machine, context, address, key):
        self.machine, self.address, self.key = machine, address, key
        self.page = log_in(context, address, key)
        self.page.set_default_timeout(PATIENCE)

    def looks_at_a_new_run(self, name):
        """Fills in the form, and sees what is trained, and the plan."""
        fill_in(self.page, self.machine, name)
        self.page.get_by_role("button", name="Look at it").click()
        self.page.locator("#preview .t-green").first.wait_for()
        self.page.locator("#plan").get_by_text("micro-batch").first.wait_for()

    def sees_curves_move(self):
        self.page.locator(".badge.running").first.wait_for()
        curve = self.page.wait_for_function(f"() => {CURVE}").json_value()
        self.page.wait_for_function(f"before => {CURVE} !== before", arg=curve)

    def stops_and_resumes(self, name):
        """Returns the step at which it had stopped."""
        self.page.goto(f"{self.address}/runs/{name}")
        self.page.get_by_role("button", name="Stop").click()
        self.page.locator(".badge.stopped").first.wait_for()
        stopped = run_status(str(self.machine.root / name)).step
        self.page.locator("button:has-text('Resume'):enabled").click()
        self.page.locator("h1 .badge.finished").wait_for()
        return stopped

    def compares(self, a, b):
        self.page.get_by_role("link", name="Compare").click()
        self.page.locator("select[name=a]").select_option(a)
        self.page.locator("select[name=b]").select_option(b)
        self.page.get_by_role("button", name="Compare").click()
        self.page.get_by_role("rowheader", name="overall").wait_for()

    def exports(self, name):
        self.page.goto(f"{self.address}/runs/{name}")
        self.page.locator("button:has-text('Export'):enabled").click()
        self.page.locator(".command", has_text=f"smolray export {name}").locator(".badge.finished").wait_for()

    def tries(self, image, *models):
        """Asks two models about an image; returns their answers."""
        self.page.get_by_role("link", name="Try").click()
        self.page.get_by_label("Image", exact=True).set_input_files(image)
        self.page.get_by_label("Question").fill("what shape is in the image?")
        self.page.get_by_label("Model").select_option(models[0])
        self.page.get_by_label("Beside it").select_option(models[1])
        self.page.locator("button:has-text('Ask')").click()
        self.page.locator("#spoken h2").nth(1).wait_for()
        self.page.locator("button:has-text('Ask'):enabled").wait_for()
        assert self.page.locator("#spoken .fault").count() == 0, self.page.locator("#spoken").inner_text()
        texts = (self.page.locator("#spoken h2"), self.page.locator("#spoken p"))
        return dict(zip(*(text.all_inner_texts() for text in texts), strict=True))


def test_from_the_data_to_an_answer(ray_cluster, tmp_path):
    export_easy_vqa(tmp_path, limit=100)
    (tmp_path / "shape.png").write_bytes(picture(64, 64, 1))
    ray_address = ray_cluster.get_runtime_context().gcs_address
    with machine(tmp_path, ray_address) as one, chromium() as browser:
        port, endpoint = free_port(), free_port()
        key, address = add_key(one.keys, "anna", ("operate", "infer")), f"http://127.0.0.1:{port}"
        web = one.start("web", "--port", port)
        one.wait_for(lambda: one.answers(address), "web")
        anna = Person(one, browser.new_context(), address, key)
        anna.looks_at_a_new_run("first")
        anna.page.get_by_role("button", name="Start").click()
        anna.sees_curves_move()

        web.kill()
        web.wait()
        before = len(steps_of(one.root / "first"))
        anna.page.locator("#connection:visible").wait_for()
        one.wait_for(lambda: len(steps_of(one.root / "first")) > before + 2, "web")
        one.start("web", "--port", port, "--endpoint", f"http://127.0.0.1:{endpoint}/v1", "--api-key", key)
        anna.page.wait_for_url(lambda url: "/login" in url)  # the new pages do not know the old cookie

        anna = Person(one, browser.new_context(), address, key)
        assert 0 < anna.stops_and_resumes("first") < STEPS
        assert steps_of(one.root / "first") == list(range(1, STEPS + 1)), "a step was lost or done twice"
        shutil.copytree(one.root / "first", one.root / "second")
        one.start("serve", "first", "second", "--port", endpoint)
        anna.compares("second", "first")
        anna.exports("first")
        assert (one.root / "first" / "export" / "model.safetensors").exists()

        one.wait_for(lambda: one.answers(f"http://127.0.0.1:{endpoint}/health"), "serve")
        answers = anna.tries(tmp_path / "shape.png", "first", "second")
        assert list(answers) == ["first", "second"] and all(answers.values())
        assert anna.page.faults == []
