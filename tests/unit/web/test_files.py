"""A name is that of one folder below the storage, or it is nothing."""

import pytest

from smolray.web.files import NotFoundError, read_inside, run_folder
from tests.commands import write_run


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "demo/", "demo\0", "..\\demo", "/etc", "nothing"])
def test_only_runs_of_the_storage_have_a_folder(tmp_path, name):
    write_run(tmp_path)
    assert run_folder(str(tmp_path), "demo").name == "demo"
    with pytest.raises(NotFoundError, match="no run"):
        run_folder(str(tmp_path), name)


def test_a_file_behind_a_link_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "runs").mkdir()
    run = write_run(tmp_path / "runs")
    (tmp_path / "secret").write_text("secret")
    (run / "report.html").symlink_to(tmp_path / "secret")
    (run / "own.html").symlink_to(run / "events.jsonl")
    root = str(tmp_path / "runs")
    with pytest.raises(NotFoundError, match=r"no report\.html"):
        read_inside(root, f"{run}/report.html")
    assert read_inside(root, f"{run}/own.html")
