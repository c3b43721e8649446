"""The report is one page that fetches nothing, escapes everything, and draws what the run logged."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smolray.config import load_config, to_yaml
from smolray.report.run import write_report

VOID = {"meta", "img", "br"}  # elements of SVG close themselves
EVIL = "<script>alert('x')</script>&\"quoted\""
STEPS = 30


class Page(HTMLParser):
    """Collects tags, text and attributes, and checks that what opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def png(colour):
    sink = BytesIO()
    Image.new("RGB", (16, 16), colour).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def run(tmp_path):
    """A run of 30 step events with a restart, an evaluation, and two images with three predictions."""
    folder = tmp_path / "demo"
    (folder / "predictions").mkdir(parents=True)
    events = [{"event": "start", "workers": 2, "total_steps": 300, "versions": {"torch": "2"}, "attempt": 1}]
    for i in range(1, STEPS + 1):
        events.append(
            {"event": "step", "step": 10 * i, "loss": 3 / i, "samples": 64, "seconds": 2.0, "data_wait_seconds": 0.1}
        )
        if i == 20:
            events += [{"event": "start", "workers": 1, "attempt": 2}, {"event": "resume", "step": 200}]
    events[3]["loss"] = float("nan")
    events += [
        {"event": "evaluate", "step": 300, "accuracy": {"overall": 0.75, "color": 0.9}},
        {"event": "skipped", "what": EVIL, "why": "torn"},
    ]
    events.append({"event": "end", "status": "finished", "step": 300, "seconds": 60})
    (folder / "events.jsonl").write_text(
        "".join(json.dumps({"attempt": 1, "time": 1.8e9 + i} | e) + "\n" for i, e in enumerate(events))
    )
    config = load_config(None, ["name=demo", f"storage={tmp_path}", f"data.train={EVIL}", "lora.r=4"])
    (folder / "config.yaml").write_text(to_yaml(config))
    result = {
        "accuracy": {"overall": 0.88, "color": 1.0, "yes/no": 0.76},
        "accuracy_counts": {"color": 1, "yes/no": 2},
        "blind_baseline": 0.67,
    }
    (folder / "result.json").write_text(
        json.dumps(result | {"samples": 1920, "steps": 300, "train_seconds": 50, "versions": {"ray": "2.60"}})
    )
    rows = [
        ("color", EVIL, "red", "red", True, "a"),
        ("yes/no", "is it?", EVIL, "no", False, "b"),
        ("yes/no", "is it?", "no", "no", True, "b"),
    ]
    names = ("type", "question", "prediction", "answer", "correct", "key")
    table = pa.Table.from_pylist([{"id": str(i)} | dict(zip(names, row, strict=True)) for i, row in enumerate(rows)])
    pq.write_table(
        table.set_column(2, "question", pa.array(["stale"] * 3)), folder / "predictions" / "step-00000200.parquet"
    )
    pq.write_table(table, folder / "predictions" / "step-00000300.parquet")
    return folder


def page_of(uri):
    from pathlib import Path

    text = Path(uri).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_fetches_nothing_and_runs_nothing(run):
    text, page = page_of(write_report(str(run), {"a": png("red"), "b": png("blue")}))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/")


def test_what_users_wrote_is_text(run):
    text, page = page_of(write_report(str(run), {"a": png("red"), "b": png("blue")}))
    assert "<script" not in text
    assert sum(EVIL in data for data in page.text) >= 4, "question, prediction, data path, skipped event"


def test_numbers_stand_where_they_belong(run):
    text, page = page_of(write_report(str(run)))
    told = " ".join(" ".join(page.text).split())
    assert told.index("88.0 %") < told.index("67.0 %") < told.index("100.0 %")
    for part in (
        "exact-match accuracy",
        "without the image",
        "finished",
        "LoRA r=4",
        "1.92k samples",
        "50s training",
        "1 restart",
        "ray",
    ):
        assert part in told, part
    assert re.search(r"overall</th><td>3</td><td>88.0 %", text)


def test_a_search_is_not_called_exact_match(run):
    (run / "config.yaml").write_text(to_yaml(load_config(None, ["name=demo", "method=retrieval"])))
    told = " ".join(" ".join(page_of(write_report(str(run)))[1].text).split())
    assert "88.0 % of the texts find their image first" in told and "Found first" in told
    assert "exact-match" not in told and "Validation accuracy" not in told


def test_every_logged_point_is_drawn_once(run):
    text, _ = page_of(write_report(str(run)))
    lines = [len(points.split()) for points in re.findall(r'<polyline class="line [^"]*" points="([^"]*)"', text)]
    assert lines == [STEPS - 1, STEPS - 1, 1, 1, STEPS, STEPS], (
        "loss without its NaN, smoothed, two accuracies, throughput, wait"
    )
    assert text.count('class="mark"') == 3, (
        "the restart, in loss, throughput and wait; the one evaluation comes after it"
    )
    assert "nan" not in " ".join(re.findall(r"<svg.*?</svg>", text, re.S)).lower()


def test_samples_show_image_truth_and_a_verdict_in_words(run):
    _, page = page_of(write_report(str(run), {"a": png("red"), "b": png("blue")}))
    assert [base64.b64decode(i["src"].split(",")[1]) for i in page.all("img")] == [png("red"), png("blue")]
    words = [t.strip() for t in page.text]
    assert words.count("✓ correct") == 2
    assert words.count("✗ incorrect") == 1
    assert words.count("truth: no") == 1
    assert "stale" not in words, "the newest predictions are shown"


def test_a_report_written_again_keeps_its_images(run):
    first, _ = page_of(write_report(str(run), {"a": png("red"), "b": png("blue")}))
    again, _ = page_of(write_report(str(run)))
    assert first == again


@pytest.mark.parametrize(
    "missing",
    [
        ["result.json"],
        ["config.yaml", "predictions"],
        ["events.jsonl"],
        ["result.json", "config.yaml", "predictions", "events.jsonl"],
    ],
)
def test_a_report_needs_none_of_its_parts(run, missing):
    for name in missing:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text, page = page_of(write_report(str(run)))
    assert "demo" in page.text[0] or "demo" in text
    if "result.json" in missing:
        assert ("75.0 %" in text) == ("events.jsonl" not in missing), "the last evaluation of the log stands in"
    if "events.jsonl" in missing:
        assert "Nothing logged yet." in text


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine to render the page with")
@pytest.mark.parametrize("width", [1100, 480])
def test_a_browser_shows_the_page_without_overflow_or_requests(run, tmp_path, width):
    from pathlib import Path

    page = tmp_path / "probe.html"
    report = Path(write_report(str(run), {"a": png("red"), "b": png("blue")})).read_text(encoding="utf-8")
    probe = (
        "<script>onload = () => document.title = JSON.stringify({wide: document.documentElement.scrollWidth "
        "- innerWidth,"
        "charts: [...document.querySelectorAll('figure')].filter(f => "
        "f.querySelector('svg').getBoundingClientRect().height > 60).length,"
        "images: [...document.images].filter(i => i.naturalWidth === 16).length,"
        "requests: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length})</script>"
    )
    page.write_text(report.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(title.group(1))
    assert found == {"wide": 0, "charts": 4, "images": 2, "requests": 0}


def test_the_report_tells_what_became_of_the_data(run):
    from smolray.run.account import DataAccount, RowAccount

    account = DataAccount(EVIL, 20, RowAccount(with_images=21, quarantined={EVIL: 1}), too_long=2, max_length=9)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"data": {"train": account.to_json()}}))
    _, page = page_of(write_report(str(run)))
    said = " ".join(page.text)
    assert all(line in said for line in account.lines("train")) and not page.all("script")
