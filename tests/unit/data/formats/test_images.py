"""Image values of every spelling are read, and nothing outside of the source is opened unless a setting says so."""

import base64
import http.server
import threading
import zipfile

import pytest

from smolray.config import DataConfig
from smolray.data.formats.fetch import fetch, is_public
from smolray.data.formats.images import ImageReader, image_reader
from smolray.data.formats.source import ReadTask
from smolray.data.sample import SampleError
from tests.offline import picture

RED = picture(40, 30)
BASE64 = base64.b64encode(RED).decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "0 1.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(RED)
    return tmp_path / "data"


def reader_of(folder, data_format="jsonl", **data):
    return image_reader(ReadTask(data_format, f"{folder}/x.jsonl", "x", str(folder), 0), DataConfig(**data))


def refused(reader, value):
    with pytest.raises(SampleError) as error:
        reader.read(value)
    assert len(str(error.value)) < 500
    return f"{error.value.reason}: {error.value}"


def test_every_spelling_of_an_image_is_read(folder):
    path = "images/0 1.png"
    values = [
        RED,
        path,
        "images\\0 1.png",
        f"file://{folder}/{path}",
        f"file://{folder}/images/0%201.png",
        "file:images/0%201.png",
        f"{folder}/{path}",
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{BASE64[:60]}\n{BASE64[60:]}",
        BASE64,
        BASE64.rstrip("="),
    ]
    values += [{"bytes": RED, "path": "gone.png"}, {"bytes": None, "path": path}, {"url": values[7]}, {"path": BASE64}]
    reader = reader_of(folder)
    assert all(reader.read(value) == RED for value in values)


def test_a_message_never_holds_the_base64(folder):
    reader = reader_of(folder)
    for value in ("data:image/png;base64," + BASE64[:-9] + "!" * 900, "data:image/png;base64" + BASE64, "x" * 3000):
        assert "AAAA" not in refused(reader, value) and BASE64[20:60] not in refused(reader, value)


def test_a_path_leads_inside_the_source_or_the_setting_says_so(folder):
    (folder / "link.png").symlink_to("../secret.png")
    secret = str(folder.parent / "secret.png")
    for path in (secret, "../secret.png", "link.png", f"file://{secret}", "..\\secret.png", "images/../../secret.png"):
        message = refused(reader_of(folder), path)
        assert message.startswith("path_escapes") and "data.allow_absolute_paths=true" in message
        assert reader_of(folder, allow_absolute_paths=True).read(path) == RED
    assert "PNG" not in refused(reader_of(folder), "link.png")


def test_rows_of_an_archive_name_no_files(folder):
    for path in ("images/0 1.png", f"{folder}/images/0 1.png", "/etc/passwd"):
        reader = reader_of(folder, "webdataset", allow_absolute_paths=True)
        assert "named inside an archive is not opened" in refused(reader, path)
    assert reader_of(folder, "webdataset").read(f"data:image/png;base64,{BASE64}") == RED


def test_paths_are_relative_to_the_image_root(folder, tmp_path):
    (tmp_path / "json").mkdir()
    reader = reader_of(tmp_path / "json", image_root=str(folder))
    assert reader.read("images/0 1.png") == reader.read(f"{folder}/images/0 1.png") == RED
    assert refused(reader, "../secret.png").startswith("path_escapes")
    assert "data.image_root names another folder" in refused(reader_of(tmp_path / "json"), "0.png")


def test_a_link_into_the_blobs_of_the_hub_cache_is_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "hash").write_bytes(RED)
    (tmp_path / "snapshots" / "rev").mkdir(parents=True)
    (tmp_path / "snapshots" / "rev" / "a.png").symlink_to("../../blobs/hash")
    assert reader_of(tmp_path / "snapshots" / "rev").read("a.png") == RED


def test_images_are_found_in_a_zip_beside_the_data(folder):
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("a.png", RED)
        archive.writestr("deep/b.png", RED)
        archive.writestr("train/c.png", RED)
    reader = reader_of(folder)
    for path in ("a.png", "train/a.png", "deep/b.png", "deep\\b.png", "c.png", "train/c.png"):
        assert reader.read(path) == RED
    assert refused(reader, "d.png").startswith("missing_file")


def test_a_file_that_is_no_image_is_named_without_its_bytes(folder):
    reader = reader_of(folder)
    kinds = {
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "PDF": b"%PDF-1.7 secret",
        "HTML": b"<!DOCTYPE html><html>",
    }
    for kind, content in kinds.items():
        message = refused(reader, content)
        assert kind in message and "write it as PNG or JPEG" in message and "secret" not in message
    assert "root:x" not in refused(reader, b"root:x:0:0")


def test_heic_is_read_with_pillow_heif(folder):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = pillow_heif.from_bytes("RGB", (64, 48), bytes(64 * 48 * 3))
    image.save(folder / "a.heic")
    assert len(reader_of(folder).read("a.heic")) > 100


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        redirects = {
            "/to-private": "http://127.0.0.2:1/",
            "/moved": "/a.png",
            "/loop": "/loop",
            "/file": "file:///etc/passwd",
        }
        self.send_response(
            302 if self.path in redirects else 200 if self.path == "/a.png?size=1" or self.path == "/a.png" else 404
        )
        if self.path in redirects:
            self.send_header("Location", redirects[self.path])
        self.end_headers()
        self.wfile.write(RED)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_where_the_setting_says_so(folder, server):
    hint = "is a URL, which is not fetched; download the images next to the data, or set data.fetch_urls=true"
    assert hint in refused(reader_of(folder), f"{server}/a.png") and hint in refused(
        reader_of(folder), {"url": "https://x.org/a.png?token=secret"}
    )
    assert "secret" not in refused(reader_of(folder), "https://x.org/a.png?token=secret")
    message = refused(reader_of(folder, fetch_urls=True), f"{server}/a.png")
    assert "127.0.0.1, which is not a public address" in message


def test_what_is_fetched_is_bounded_and_each_redirect_is_checked(server, monkeypatch):
    def here(address):
        return address == "127.0.0.1"

    assert fetch(f"{server}/a.png?size=1", here) == fetch(f"{server}/moved", here) == RED
    for path, fault in (
        ("/to-private", "127.0.0.2, which is not a public address"),
        ("/loop", "more than 4 redirects"),
        ("/gone", "the server answers 404"),
        ("/file", "leads to file://, which is not fetched"),
    ):
        with pytest.raises(SampleError, match=fault):
            fetch(server + path, here)
    assert fetch(f"{server}/moved", here, hosts=("127.0.0.1",)) == RED
    for path in ("/a.png", "/to-private"):
        with pytest.raises(SampleError, match=r"127\.0\.0\.\d is not among the hosts"):
            fetch(server + path, here, hosts=("example.com",) if path == "/a.png" else ("127.0.0.1",))
    monkeypatch.setattr("smolray.data.formats.fetch.MAX_BYTES", 50)
    with pytest.raises(SampleError, match="more than 50 bytes"):
        fetch(f"{server}/a.png", here)


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
        *("::1", "fe80::1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1"),
    ],
)
def test_a_private_address_is_not_public(address):
    assert not is_public(address)


def test_a_public_address_is():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert ImageReader("", "", 1).fetch_urls is False
