"""The pages let in who has a key with the scope, refuse what other sites send, and show all text as text."""

import re
from html.parser import HTMLParser

import pytest

from smolray.run.status import stop_requested
from smolray.serve.keys import add_key, revoke_key
from smolray.web.app import ROUTES
from tests.webpages import EVIL, HOST, Browser, keyed, site_of, write_folder


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs"
    write_folder(folder, "one")
    write_folder(folder, "two", right=(True, True))
    write_folder(folder, "going", status="")
    return folder


def attributes_of(text):
    """(name, value) of all attributes of a page, as a browser reads them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = parser.handle_startendtag = lambda tag, attributes: found.extend(attributes)
    parser.feed(text)
    return found


def path_of(route):
    return route.path.replace("{name}", "one")


def test_without_a_login_no_page_is_seen_and_nothing_is_done(tmp_path, root):
    site, _ = keyed(tmp_path, root, "view")
    stranger = Browser(site)
    for route in ROUTES:
        answer = stranger.client.request(route.verb, path_of(route), headers={"origin": HOST})
        assert answer.status_code in (303, 401), route
        assert "what is it?" not in answer.text and answer.headers.get("location", "/login") == "/login"
    assert not stop_requested(str(root / "going"))


def test_a_key_opens_what_its_scopes_say(tmp_path, root):
    _, viewer = keyed(tmp_path, root, "view")
    assert viewer.get("/runs/going").status_code == 200
    for route in ROUTES:
        if route.verb == "POST":
            assert viewer.post(path_of(route).replace("one", "going")).status_code == 403, route
    assert not stop_requested(str(root / "going")) and "Stop</button>" not in viewer.get("/runs/going").text
    site = site_of(root, tmp_path / "other.json")
    operator = Browser(site, add_key(tmp_path / "other.json", "operator", ("operate",)))
    assert operator.post("/runs/going/stop").headers["location"] == "/runs/going"
    assert stop_requested(str(root / "going"))
    assert "stops as soon as it has saved" in operator.get("/runs/going").text
    asks_only = add_key(tmp_path / "other.json", "asks", ("infer",))
    assert "opens no page" in Browser(site).post("/login", page="/login", key=asks_only).text


def test_a_wrong_or_revoked_key_lets_nobody_in(tmp_path, root):
    site, viewer = keyed(tmp_path, root, "view")
    stranger = Browser(site)
    answer = stranger.post("/login", page="/login", key="sk-smolray-wrong")
    assert answer.status_code == 403 and "not known" in answer.text
    assert stranger.get("/").status_code == 303
    cookie = viewer.client.cookies["smolray_session"]
    assert viewer.get("/").status_code == 200
    revoke_key(tmp_path / "keys.json", "user")
    assert viewer.get("/").status_code == 303
    assert len(cookie) > 40


def test_a_logout_ends_the_session_also_for_a_copied_cookie(tmp_path, root):
    site, viewer = keyed(tmp_path, root, "view")
    copied = Browser(site)
    copied.client.cookies.set("smolray_session", viewer.client.cookies["smolray_session"])
    assert copied.get("/").status_code == 200
    assert viewer.post("/logout").status_code == 303
    assert copied.get("/").status_code == 303


def test_the_cookie_is_for_this_site_alone_and_no_script_reads_it(tmp_path, root):
    site, _ = keyed(tmp_path, root, "view")
    browser = Browser(site)
    token = browser.token("/login")
    key = add_key(tmp_path / "keys.json", "other", ("view",))
    answer = browser.client.post("/login", data={"token": token, "key": key}, headers={"origin": HOST})
    cookie = next(c for c in answer.headers.get_list("set-cookie") if c.startswith("smolray_session="))
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie


def test_what_another_site_sends_is_refused(tmp_path, root):
    _, operator = keyed(tmp_path, root, "operate")
    token = operator.token("/runs/going")
    for headers in ({}, {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost.evil"}):
        answer = operator.client.post("/runs/going/stop", data={"token": token}, headers=headers)
        assert answer.status_code == 403 and "another site" in answer.text
    for fields in ({}, {"token": ""}, {"token": token[:-1]}, {"token": "\ud800"[:0] + "ü"}):
        assert operator.client.post("/runs/going/stop", data=fields, headers={"origin": HOST}).status_code == 403
    stranger = Browser(operator.client.app.state.site)
    other = stranger.token("/login")
    assert operator.client.post("/runs/going/stop", data={"token": other}, headers={"origin": HOST}).status_code == 403
    assert not stop_requested(str(root / "going"))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.0.2.1", "", "[2001:db8::1]:80"])
def test_a_host_that_is_not_ours_is_refused(root, host):
    answer = Browser(site_of(root)).get("/", host=host)
    assert answer.status_code == 403 and "not known here" in answer.text


def test_addresses_and_given_names_are_known_hosts(root):
    for host in ("127.0.0.1:8080", "[::1]:8080", "LOCALHOST:1"):
        assert Browser(site_of(root)).get("/", host=host).status_code == 200
    public = Browser(site_of(root), hosts=("runs.example",), own=False)
    assert [public.get("/", host=h).status_code for h in ("192.0.2.1:80", "runs.example", "evil.example")] == [
        200,
        200,
        403,
    ]


def test_every_answer_forbids_scripts_of_others(tmp_path, root):
    site, viewer = keyed(tmp_path, root, "view")
    for path in ("/", "/runs/one", "/compare", "/static/web.js", "/nowhere", "/runs/none"):
        answer = viewer.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "no-store" in viewer.get("/").headers["cache-control"]
    assert "sandbox" in viewer.get("/runs/one/report").headers["content-security-policy"]
    assert Browser(site).get("/login").headers["content-security-policy"]


def test_text_of_data_sets_and_names_is_shown_as_text(tmp_path):
    root = tmp_path / "runs"
    write_folder(root, "<img src=x onerror=alert(1)>", question=EVIL, wrong=EVIL, **{"data.train": EVIL})
    write_folder(root, "failed", status="failed", question=EVIL)
    browser = Browser(site_of(root))
    listed = browser.get("/").text
    path = re.search(r'href="(/runs/%3Cimg[^"]*)"', listed)[1]
    pages = [listed, *(browser.get(p).text for p in (path, "/runs/failed", f"/compare?a={EVIL}&b={EVIL}"))]
    for text in pages:
        scripts = re.findall(r"<script[^>]*>", text)
        assert len(scripts) == 1 and 'src="/static/web.js?' in scripts[0]
        attributes = attributes_of(text)
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]
        assert ("src", "x") not in attributes and "javascript:" not in text
    assert "&lt;script&gt;alert" in pages[1] and "broken: &lt;script&gt;" in pages[2]


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "%2fetc%2fpasswd", "one%2f..%2fone", "one%00", "..%5cone", "linked", "none"]
)
def test_no_name_leads_out_of_the_storage(tmp_path, root, name):
    outside = write_folder(tmp_path / "outside", "secret")
    (root / "linked").symlink_to(outside)
    (root / "one" / "report.html").unlink()
    (root / "one" / "report.html").symlink_to("/etc/passwd")
    browser = Browser(site_of(root))
    for path in ("", "/report", "/image?key=k0", "/live"):
        answer = browser.get(f"/runs/{name}{path}")
        assert answer.status_code == 404, answer.text
    assert "root:" not in browser.get("/runs/one/report").text
    assert "linked" not in browser.get("/").text


def test_a_page_of_a_run_shows_its_curves_answers_and_report(root):
    browser = Browser(site_of(root))
    text = browser.get("/runs/one").text
    for words in ("Training loss", "Samples per second", "Memory of a worker, GiB", "Waiting for data", "✓ correct"):
        assert words in text
    assert "truth: red" in text and 'src="/runs/one/image?key=k0"' in text
    image = browser.get("/runs/one/image?key=k0")
    assert image.headers["content-type"] == "image/png" and image.content.startswith(b"\x89PNG")
    assert browser.get("/runs/one/image?key=../../x").status_code == 404
    assert "the report" in browser.get("/runs/one/report").text
    assert browser.get("/runs/two/report").status_code == 200 and browser.get("/runs/going/report").status_code == 404


def test_two_runs_are_compared_question_by_question(root):
    browser = Browser(site_of(root))
    text = browser.get("/compare?a=one&b=two").text
    assert "+50.0 %" in text and "Gained: b answers better" in text and "1 what is it?" in text
    assert "evaluated once" in browser.get("/compare?a=one&b=one").text
    assert "no metric" in browser.get("/compare?a=one&b=two&metric=x").text
    assert browser.get("/compare?a=one&b=../x").status_code == 404


def test_without_runs_the_pages_say_so(tmp_path):
    browser = Browser(site_of(tmp_path / "none"))
    assert "No run here yet" in browser.get("/").text and "No run has been evaluated" in browser.get("/compare").text


def test_a_damaged_log_is_told_and_hides_no_other_run(tmp_path, root):
    (root / "two" / "events.jsonl").write_text('{"event": "step", "step": "x"}\n{"event": "start"}\n')
    browser = Browser(site_of(root))
    assert "one" in browser.get("/").text and browser.get("/").status_code == 200
    answer = browser.get("/runs/two")
    assert answer.status_code == 409 and "is damaged" in answer.text
