"""Runs to look at, and browsers of the pages of `smolray web`, as a test client."""

import io
import json
import random
import re
import time

from fastapi.testclient import TestClient
from PIL import Image, ImageDraw

from smolray.config import load_config, to_yaml
from smolray.report.run import write_images
from smolray.run.predictions import write_predictions
from smolray.serve.keys import KeyRing, add_key
from smolray.tune.report import read_report, searches_in
from smolray.web.app import make_app
from smolray.web.processes import Processes
from smolray.web.run_list import RunList
from smolray.web.sessions import Sessions
from smolray.web.site import Searches, Site

HOST = "http://localhost"
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'"
SHAPES = [("rectangle", "#c0392b"), ("ellipse", "#2f6fb3"), ("ellipse", "#c0392b"), ("rectangle", "#2f8556")]
NUMBERS = {"samples": 64, "tokens": 900, "memory_bytes": 7 * 2**30}


def write_folder(
    root, name, steps=30, status="finished", question="what is it?", right=(True, False), wrong="blue", **settings
):
    """A run that has trained `steps` steps and was evaluated, with two images; `status` "": it goes on."""
    folder = root / name
    folder.mkdir(parents=True)
    given = [f"storage={root}", *(f"{key}={value}" for key, value in settings.items())]
    (folder / "config.yaml").write_text(to_yaml(load_config(None, given)).replace("name: run", f"name: {name!r}"))
    began, chance = time.time() - steps - 10, random.Random(name)
    events = [
        {"event": "start", "workers": 2, "total_steps": steps if status == "finished" else 2 * steps, "time": began}
    ]
    for step in range(1, steps + 1):
        loss, seconds = 3 / step**0.5 * chance.uniform(0.8, 1.2), chance.uniform(0.9, 1.1)
        measured = {**NUMBERS, "loss": loss, "seconds": seconds, "data_wait_seconds": chance.uniform(0.01, 0.06)}
        events.append({"event": "step", "step": step, "epoch": step / steps, "time": began + step, **measured})
    accuracy = sum(right) / len(right)
    events.append({"event": "checkpoint", "step": steps, "path": f"{folder}/checkpoints/step-{steps:08d}"})
    events.append({"event": "evaluate", "step": steps, "accuracy": {"overall": accuracy, "kind": accuracy}})
    if status:
        error = {"error": f"broken: {question}"} if status == "failed" else {}
        events.append({"event": "end", "status": status, "step": steps, "seconds": 60, **error})
    lines = (json.dumps({"attempt": 1, "time": time.time()} | event) for event in events)
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rows = [
        {"id": str(n), "key": f"k{n % len(SHAPES)}", "type": "kind", "question": f"{n} {question}", "correct": good}
        | {"prediction": "red" if good else wrong, "answer": "red", "answers": ["red"]}
        for n, good in enumerate(right)
    ]
    write_predictions(str(folder), steps, rows)
    write_images(str(folder), {f"k{n}": picture(*SHAPES[n]) for n in range(len(SHAPES))})
    if status == "finished":
        (folder / "report.html").write_text("<!doctype html><title>report</title>the report")
    return folder


def picture(shape, colour):
    """A PNG of a shape."""
    image, sink = Image.new("RGB", (96, 96), "#f0ead8"), io.BytesIO()
    getattr(ImageDraw.Draw(image), shape)((20, 20, 76, 76), fill=colour)
    image.save(sink, "PNG")
    return sink.getvalue()


def site_of(root, keys=None):
    """The pages of the runs in `root`; `keys`: the file of the keys, None: no key is asked for."""
    sessions = Sessions(KeyRing(keys) if keys else None)
    return Site(
        str(root), sessions, Processes(root.parent / "commands"), RunList(str(root)), Searches(searches_in, read_report)
    )


class Browser:
    """A browser at the pages: cookies, forms with their token, and the Origin that browsers send."""

    def __init__(self, site, key=None, **how):
        self.client = TestClient(make_app(site, **how), base_url=HOST, follow_redirects=False)
        if key:
            assert self.post("/login", page="/login", key=key).status_code == 303

    def get(self, path, **headers):
        return self.client.get(path, headers=headers)

    def token(self, path):
        """The token in the forms of a page."""
        return re.search(r'name="token" value="(\w+)"', self.get(path).text)[1]

    def post(self, path, page="/", **fields):
        """Send a form of `page`."""
        fields = {"token": self.token(page), **fields}
        return self.client.post(path, data=fields, headers={"origin": HOST})


def keyed(tmp_path, root, *scopes):
    """A site that asks for keys, and a browser that is logged in with a key of these scopes."""
    keys = tmp_path / "keys.json"
    site = site_of(root, keys)
    return site, Browser(site, add_key(keys, "user", scopes))
