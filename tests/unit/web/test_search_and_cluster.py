"""Searches as their report shows them, and the cluster as the doctor finds it."""

import pytest

from smolray.cluster.findings import Finding, findings_json, ok
from smolray.config import load_config, to_yaml
from smolray.tune.log import STORED, TrialLog
from smolray.web.cluster_page import found_in
from tests.webpages import Browser, site_of

SEARCH = "search={space: {optimizer.learning_rate: {loguniform: [1e-5, 1e-3]}}, metric: loss}"


@pytest.fixture
def root(tmp_path):
    return write_search(tmp_path / "runs")


def write_search(root):
    """A search with two trials."""
    folder = root / "find"
    folder.mkdir(parents=True)
    config = load_config(None, ["name=find", f"storage={root}", SEARCH])
    (folder / STORED).write_text(to_yaml(config))
    log = TrialLog(str(folder))
    log.write("start", trials=2, slots=1)
    for number, rate in ((1, 1e-4), (2, 5e-4)):
        settings = {"optimizer.learning_rate": rate}
        log.write("trial", number=number, run=f"find-{number}", settings=settings)
        log.write("report", number=number, report=1, run="", step=9, loss=1 / number, seconds=3.0, workers=1)
        log.write("end", number=number, status="finished", reason="<script>alert(1)</script>")
    return root


def test_a_search_shows_its_trials_settings_and_curves(root):
    browser = Browser(site_of(root))
    assert 'href="/searches/find"' in browser.get("/searches").text
    text = browser.get("/searches/find").text
    for words in ("loss of trial 2", "Settings and loss of each trial", "Learning curves", "learning_rate 0.0005"):
        assert words in text, words
    assert "<script>alert" not in text and "style=" not in text
    for name in ("none", "..%2ffind", "%2e%2e"):
        assert browser.get(f"/searches/{name}").status_code in (404, 409)


def test_without_a_search_the_page_says_so(tmp_path):
    assert "No search here yet" in Browser(site_of(tmp_path / "none")).get("/searches").text


def test_findings_are_read_also_behind_warnings_of_others():
    findings = [ok("driver", "a", "570"), Finding("time", "b", "fail", "9 s off", "below 1 s", "run chrony")]
    assert found_in(findings_json(findings)) == findings
    assert found_in("a warning [1]\n" + findings_json(findings) + "\n") == findings
    for broken in ("", "error: no cluster", "[1]", '[{"x": 1}]'):
        assert found_in(broken) == []


def test_the_page_says_that_there_is_no_cluster_and_what_to_do(root):
    browser = Browser(site_of(root))
    assert "Not examined yet" in browser.get("/cluster").text
    assert browser.post("/cluster/examine", page="/cluster").headers["location"] == "/cluster"
    started = browser.client.app.state.site.processes.of("the cluster")[0]
    assert started.command == "doctor"
    started.process.kill()
    started.process.wait()
    started.output.write_text("error: no cluster to look at: run it on a node")
    text = browser.get("/cluster").text
    assert "could not be looked at" in text and "run it on a node" in text
    fault = Finding("time", "<b>", "fail", "9 s off", "below 1 s", "run chrony")
    started.output.write_text(findings_json([ok("driver", "a", "570"), fault]))
    text = browser.get("/cluster").text
    assert text.index("&lt;b&gt;") < text.index(">570</td>") and "run chrony" in text


def test_a_node_is_drained_by_the_command_whatever_it_is_called(root):
    site = site_of(root)
    site.address = "http://192.0.2.1:8265"
    browser = Browser(site)
    assert browser.post("/cluster/drain", page="/cluster", node=" --help ").status_code == 303
    [started] = site.processes.of("the cluster")
    started.process.kill()
    started.process.wait()
    address = ["--address", site.address, "--storage", site.root]
    assert started.process.args[-8:] == ["cluster", "drain", *address, "--", "--help"], "a name is no option"
    started.output.write_text("0 nodes are called '<b>'")
    text = browser.get("/cluster").text
    assert "smolray cluster drain --help" in text and "called &#39;&lt;b&gt;" in text and "Not examined yet" in text
    assert browser.post("/cluster/drain", page="/cluster", node=" ").status_code == 409


def test_without_a_job_server_no_node_is_drained(root):
    browser = Browser(site_of(root))
    assert "Drain" not in browser.get("/cluster").text
    assert "--address" in browser.post("/cluster/drain", page="/cluster", node="den").text
