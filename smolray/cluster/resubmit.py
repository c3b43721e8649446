"""Submits a run again when its driver is lost, for example with the head.

In: a run. Out: its output, until the run has ended. A run that finished, was stopped or failed has an end in its log.
A run whose log has no end was lost.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smolray.cluster import jobs as jobs_client
from smolray.cluster.jobs import JobsError
from smolray.config import RunConfig
from smolray.run.events import Event, read_events
from smolray.tracking.notify import send

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


RETRY_SECONDS = 2.0
NODES_SECONDS = 60.0  # how long a cluster that restarted may take to be as large as it was
MOVED_SECONDS = 60.0  # a run that is stopped to leave a node is submitted again within
NOT_INSTALLED = "RUNTIME_ENV_SETUP_FAILURE"  # Ray's word where packages or code did not get onto the node
LOSSES = 5  # in a row, without a step in between


def submit_until_ended(
    client: "JobSubmissionClient",
    config: RunConfig,
    arguments: Sequence[str],
    patience: float = 3600.0,
    working_dir: str = ".",
) -> Iterator[str]:
    """Submit the run and yield its output; submit it again whenever its driver is gone and the run has not ended.

    Where a job trains the run already, that job is followed. Waits up to `patience` seconds for a head that does not
    answer.

    Raises JobsError where the head does not come back, the cluster refuses the run, the job fails before the run can
    say why, or the run is lost five times without a step in between.
    """
    jobs_client.check_submission(config, arguments, working_dir)
    job_id = next((j.submission_id for j in jobs_client.active_jobs(client, config)), None)
    losses = 0
    while True:
        nodes, seen = len(jobs_client.living_nodes(client)), len(read_events(config.run_dir))
        if job_id is None:
            job_id = jobs_client.submit(client, config, arguments, working_dir)
            yield f"submitted {job_id}\n"
        else:
            yield f"job {job_id} trains {config.name}\n"
        yield from jobs_client.follow(client, job_id, RETRY_SECONDS, int(patience / RETRY_SECONDS))
        fresh = [e for e in read_events(config.run_dir)[seen:] if e["event"] != "launch"]
        if any(e["event"] == "end" for e in fresh) or _ended_of_its_own(client, job_id):
            job_id = _submitted_again(client, config, MOVED_SECONDS) if was_stopped(fresh) else None
            if job_id is None:
                return
            continue
        losses = 1 if any(e["event"] == "step" for e in fresh) else losses + 1
        if losses >= LOSSES:
            yield send(config, "failed", f"Its driver was lost {losses} times without a step in between.")
            raise JobsError(
                f"{config.name} was lost {losses} times without a step in between: something ends its driver; "
                f"see `ray job logs {job_id}`"
            )
        yield f"the driver of {config.name} was lost: submitting it again\n"
        yield send(config, "lost its driver", "It is submitted again.")
        _wait_for_nodes(client, nodes, NODES_SECONDS)
        job_id = None


def was_stopped(fresh: Sequence[Event]) -> bool:
    """Whether a run was stopped before it had finished or failed, by what its job has written.

    The job that trains it again may have begun to write by now.
    """
    ends = [event for event in fresh if event["event"] == "end"]
    return ends[-1]["status"] == "stopped" if ends else not fresh


def _ended_of_its_own(client: "JobSubmissionClient", job_id: str) -> bool:
    """Whether a job whose run wrote no end was stopped by someone.

    Raises JobsError where the job failed and its run could not say why.
    """
    job = client.get_job_info(job_id)
    if jobs_client.is_lost(client, job):
        return False
    if job.status.value == "FAILED" and job.error_type == NOT_INSTALLED:
        raise JobsError(f"job {job_id} could not begin: {(job.message or '').strip()[-1000:]}")
    if job.status.value == "FAILED" and (job.driver_exit_code or 0) > 0 and job.driver_exit_code != 137:  # not killed
        raise JobsError(
            f"job {job_id} failed, and its run could not say why: {client.get_job_logs(job_id).strip()[-1000:]}"
        )
    return job.status.value in ("STOPPED", "SUCCEEDED")


def _submitted_again(client: "JobSubmissionClient", config: RunConfig, seconds: float) -> str | None:
    """The job that trains a stopped run again, as `smolray cluster drain` submits it.

    None where there is none within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for job in jobs_client.active_jobs(client, config):
            return job.submission_id
        time.sleep(1)
    return None


def _wait_for_nodes(client: "JobSubmissionClient", nodes: int, seconds: float) -> None:
    """Wait until as many nodes are there as before: an elastic run would begin too small, another one be refused."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if len(jobs_client.living_nodes(client)) >= nodes:
                return
        except JobsError:
            pass  # the head is not up yet
        time.sleep(1)
