"""Screenshots of the pages of `smolray web`, each in light and dark at 390 and 1440 px: `make web-shots`.

In: sample runs, data, a search and a cluster's findings, made here; of a new run the real preview and plan. Out: PNG
files in the folder given, by default `.cache/web-shots`; names behind it choose pages. readme.png is the image of
the README, `smolray/web/docs/run.png`.
"""

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from jobs.easyvqa import export_easy_vqa
from smolray.cluster.findings import Finding, findings_json, ok
from smolray.config import load_config
from smolray.run.lease import owning
from smolray.run.queue import enter
from smolray.serve.keys import add_key
from smolray.web.app import make_app
from smolray.web.cluster_page import JOB
from smolray.web.new_page import SAMPLES
from smolray.web.site import Endpoint
from tests.browser import chromium, log_in
from tests.commands import append
from tests.server import serving
from tests.unit.web.test_data_page import write_prepared
from tests.unit.web.test_search_and_cluster import write_search
from tests.unit.web.test_try_page import running
from tests.webpages import picture, site_of, write_folder

WIDTHS = {390: 844, 1440: 900}
QUESTION = "What colour is the shape in the picture?"


def sample_runs(root):
    """Runs in every state."""
    write_folder(root, "vqa-lora", steps=160, question=QUESTION, right=[n % 7 != 0 for n in range(40)])
    write_folder(root, "vqa-full", steps=160, question=QUESTION, right=[n % 3 != 0 for n in range(40)])
    going = write_folder(
        root, "captions", steps=90, status="", question=QUESTION, right=[n % 4 != 0 for n in range(20)]
    )
    append(going, event="step", step=91, loss=0.3, seconds=1.0, samples=64, time=time.time())
    write_folder(root, "first-try", steps=20, status="failed", question="the loss is not finite at step 20")
    write_folder(root, "paused", steps=60, status="stopped")
    quiet = write_folder(root, "quiet", steps=20, status="")
    events = [json.loads(line) for line in (quiet / "events.jsonl").read_text().splitlines()]
    earlier = (json.dumps(event | {"time": event["time"] - 3600}) for event in events)
    (quiet / "events.jsonl").write_text("".join(f"{line}\n" for line in earlier))


def sample_cluster(site):
    """What the doctor has found on two nodes."""
    started = site.processes.start(JOB, ["doctor", "--help"])
    started.process.wait()
    found = [ok("driver", "tower", "570.86"), ok("clock", "tower", "0.2 ms off"), ok("driver", "den", "570.86")]
    found.append(Finding("clock", "den", "fail", "9 s off", "below 1 s", "sudo systemctl enable --now chrony"))
    found.append(Finding("speed", "den - tower", "warn", "94 MB/s", "110 MB/s", "look at the cable and the switch"))
    started.output.write_text(findings_json(found))


def draft(site, folder):
    """A new run that was looked at."""
    export_easy_vqa(folder, limit=400)
    fields = {"name": "shapes", "data.train": f"{folder}/train.parquet", "model.path": "tiny"}
    fields |= {"data.validation": f"{folder}/test.parquet", "resources.num_workers": "2"}
    given = [*(f"{key}={value}" for key, value in fields.items()), f"storage={site.root}"]
    made = site.drafts.keep("", fields | {"inventory": "2x rtx4090"}, load_config(None, given))
    for words in (["preview", "--count", str(SAMPLES)], ["plan", "--inventory", "2x rtx4090"]):
        site.processes.start(made.job, [*words, *made.arguments], shown=True).process.wait()
    return made


PAGES = {
    "runs": "/",
    "run": "/runs/captions",
    "finished": "/runs/vqa-lora",
    "failed": "/runs/first-try",
    "stalled": "/runs/quiet",
    "compare": "/compare?a=vqa-full&b=vqa-lora",
    "fault": "/runs/none",
    "new": "/new?recipe=vqa_lora",
    "data": "/data",
    "data-set": "/data?folder=abc&part=train",
    "searches": "/searches",
    "search": "/searches/find",
    "cluster": "/cluster",
    "try": "/try",
    "draft": "",
}


def shoot(out, names):
    """Write the screenshots of the pages `names` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root, keys = folder / "runs", folder / "keys.json"
        key, site = add_key(keys, "anna", ("operate", "infer")), site_of(root, keys)
        server = stack.enter_context(running())
        site.address, site.endpoint = "http://head:8265", Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
        sample_cluster(site)
        pages = {name: PAGES[name] for name in names}
        if "draft" in pages:
            pages["draft"] = f"/new/{draft(site, folder).id}"
        write_prepared(root)
        write_search(root)
        sample_runs(root)  # not before: what runs would soon be stalled
        for name, user in (("captions", "anna"), ("next-try", "ben")):
            stack.enter_context(owning(f"{root}/{name}", "train"))
            enter(str(root), name, user, 0, 2)
        address, browser = stack.enter_context(serving(make_app(site))), stack.enter_context(chromium())
        for scheme in ("light", "dark"):
            for width, height in WIDTHS.items():
                _shoot(browser, address, key, out, scheme, {"width": width, "height": height}, pages)
    if "run" in pages:
        shot = Image.open(out / "run-light-1440.png").crop((0, 0, 1440, 1390)).resize((960, 927))
        shot.save(out / "readme.png", optimize=True)


def _shoot(browser, address, key, out, scheme, size, pages):
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/login")
    page.screenshot(path=out / f"login-{scheme}-{size['width']}.png")
    page = log_in(context, address, key)
    for name, path in pages.items():
        page.goto(f"{address}{path}")
        page.wait_for_timeout(700)
        if name == "try":
            _ask(page)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        note = f" {wide} px too wide" if wide > 0 else ""
        target = out / f"{name}-{scheme}-{size['width']}.png"
        page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
        page.wait_for_timeout(300)
        page.screenshot(path=target, full_page=True)
        print(f"{target}{note}", flush=True)
    context.close()


def _ask(page):
    image = {"name": "shape.png", "mimeType": "image/png", "buffer": picture("ellipse", "#c0392b")}
    page.get_by_label("Image", exact=True).set_input_files(image)
    page.get_by_label("Question").fill("What is in the picture?")
    page.get_by_label("Beside it").select_option("tuned")
    page.get_by_role("button", name="Ask").click()
    page.locator("button:has-text('Ask'):enabled").wait_for()


if __name__ == "__main__":
    shoot(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/web-shots"), sys.argv[2:] or list(PAGES))
