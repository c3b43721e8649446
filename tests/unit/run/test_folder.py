"""One place knows the names of the files in a run's folder."""

import pytest

from smolray import storage
from smolray.run.folder import RunFolder


@pytest.mark.parametrize("uri", ["runs/demo", "s3://bucket/runs/demo/"])
def test_files_of_a_run_lie_under_its_uri(uri):
    folder, root = RunFolder(uri), uri.rstrip("/")
    assert folder.name == "demo"
    assert folder.config == f"{root}/config.yaml"
    assert folder.stop_flag == f"{root}/control/stop"
    assert folder.checkpoint(100) == f"{root}/checkpoints/step-00000100"
    assert folder.predictions_of(100) == f"{root}/predictions/step-00000100.parquet"
    assert folder.audit_of(attempt=1, rank=2) == f"{root}/audit/attempt-00001-rank-0002.jsonl"


@pytest.mark.parametrize("file", ["config", "events"])
def test_a_folder_is_a_run_once_it_holds_settings_or_events(tmp_path, file):
    folder = RunFolder(str(tmp_path / "demo"))
    assert not folder.is_run()
    storage.write_bytes(getattr(folder, file), b"")
    assert folder.is_run()
