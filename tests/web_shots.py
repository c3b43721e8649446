"""Screenshots of the pages of `smolray web`, each in light and dark at 390 and 1440 px: `make web-shots`.

In: sample runs, made here. Out: PNG files in the folder given, by default `.cache/web-shots`.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from smolray.serve.keys import add_key
from smolray.web.app import make_app
from tests.browser import chromium, log_in
from tests.commands import append
from tests.server import serving
from tests.webpages import site_of, write_folder

WIDTHS = {390: 844, 1440: 900}
QUESTION = "What colour is the shape in the picture?"


def sample_runs(root):
    """Runs in every state."""
    write_folder(root, "vqa-lora", steps=160, question=QUESTION, right=[n % 7 != 0 for n in range(40)])
    write_folder(root, "vqa-full", steps=160, question=QUESTION, right=[n % 3 != 0 for n in range(40)])
    going = write_folder(
        root, "captions", steps=90, status="", question=QUESTION, right=[n % 4 != 0 for n in range(20)]
    )
    append(going, event="step", step=91, loss=0.03, seconds=1.0, samples=64, time=time.time())
    write_folder(root, "first-try", steps=20, status="failed", question="the loss is not finite at step 20")
    write_folder(root, "paused", steps=60, status="stopped")
    quiet = write_folder(root, "quiet", steps=20, status="")
    events = [json.loads(line) for line in (quiet / "events.jsonl").read_text().splitlines()]
    earlier = (json.dumps(event | {"time": event["time"] - 3600}) for event in events)
    (quiet / "events.jsonl").write_text("".join(f"{line}\n" for line in earlier))


PAGES = {
    "runs": "/",
    "run": "/runs/captions",
    "finished": "/runs/vqa-lora",
    "failed": "/runs/first-try",
    "stalled": "/runs/quiet",
    "compare": "/compare?a=vqa-full&b=vqa-lora",
    "fault": "/runs/none",
}


def shoot(out):
    """Write all screenshots into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        root = Path(folder) / "runs"
        sample_runs(root)
        key = add_key(Path(folder) / "keys.json", "anna", ("operate", "infer"))
        with serving(make_app(site_of(root, Path(folder) / "keys.json"))) as address:
            for scheme in ("light", "dark"):
                for width, height in WIDTHS.items():
                    _shoot(browser, address, key, out, scheme, {"width": width, "height": height})


def _shoot(browser, address, key, out, scheme, size):
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/login")
    page.screenshot(path=out / f"login-{scheme}-{size['width']}.png")
    page = log_in(context, address, key)
    for name, path in PAGES.items():
        page.goto(f"{address}{path}")
        page.wait_for_timeout(700)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        note = f" {wide} px too wide" if wide > 0 else ""
        target = out / f"{name}-{scheme}-{size['width']}.png"
        page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
        page.wait_for_timeout(300)
        page.screenshot(path=target, full_page=True)
        print(f"{target}{note}", flush=True)
    context.close()


if __name__ == "__main__":
    shoot(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/web-shots"))
