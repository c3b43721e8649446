"""A submission that can only fail on the cluster is refused on this machine, with what to do."""

import pytest

from smolray.cluster import jobs
from smolray.cluster.jobs import JobsError, check_submission
from smolray.config import load_config


@pytest.fixture(params=["checkout", "elsewhere"])
def folder(request, tmp_path, monkeypatch):
    """The folder in which a run is submitted: a checkout of smolray, or any other."""
    folder = tmp_path / request.param
    folder.mkdir()
    if request.param == "checkout":
        (folder / "smolray").mkdir()
        (folder / "smolray" / "__main__.py").touch()
    (folder / "a.yaml").touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "storage = 'runs' is relative"),
        (["storage=/shared", "data.train=./data"], "data.train = './data' is a path of this machine"),
        (["storage=/shared", "model.path=local"], "model.path = 'local'"),
        (["storage=s3://key:secret@bucket/runs"], "storage carries credentials"),
    ],
)
def test_a_submission_that_cannot_work_is_refused(folder, overrides, message):
    (folder / "local").mkdir()
    with pytest.raises(JobsError) as caught:
        check_submission(load_config(None, overrides), ["--config", "a.yaml"])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["a.yaml", "vqa_lora", "s3://bucket/runs/run/config.yaml", "/shared/a.yaml"])
def test_a_submission_that_can_work_passes(folder, file):
    config = load_config(None, ["storage=s3://bucket/runs", "data.train=HuggingFaceM4/VQAv2"])
    check_submission(config, ["--config", file])


def test_a_config_outside_a_checkout_is_refused_and_uploaded_elsewhere(folder):
    config = load_config(None, ["storage=/shared", "data.train=/shared/data"])
    if folder.name == "elsewhere":
        check_submission(config, ["--config", "../a.yaml"])
        return
    with pytest.raises(JobsError, match="outside the uploaded folder"):
        check_submission(config, ["--config", "../a.yaml"])


class YoungHead:
    """A job server whose agent comes up after some submissions."""

    def __init__(self, refusals):
        self.refusals = refusals

    def list_jobs(self):
        return []

    def submit_job(self, **_):
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, try later.")
        return "raysubmit_1"


def test_a_head_that_has_just_started_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["storage=s3://bucket/runs", "data.train=s3://bucket/data"])
    assert jobs.submit(YoungHead(1), config, []) == "raysubmit_1"

    monkeypatch.setattr(jobs, "AGENT_SECONDS", 0)
    with pytest.raises(JobsError, match=r"refused the job: .*No available agent"):
        jobs.submit(YoungHead(9), config, [])
