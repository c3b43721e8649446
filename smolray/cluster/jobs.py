"""Ray Jobs from the outside: submits, finds, follows and stops the jobs of a run.

In: a cluster's address and a run. Out: jobs and their output.

A job must not contain secrets: everybody who may read the job list can read its entrypoint and its environment.
"""

import asyncio
import logging
import re
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from smolray import storage
from smolray.cluster.upload import config_argument, is_checkout, job_environment
from smolray.config import RunConfig
from smolray.config.recipes import recipes
from smolray.run.folder import CONFIG

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient


ENTRY = ("python", "-m", "smolray", "train")
JOB_FILE = "jobs/train.py"  # what `ray job submit` names in its place
logger = logging.getLogger(__name__)

STALLED_SECONDS = 10.0
AGENT_SECONDS = 60.0  # a head that has just been started takes jobs once its agent is up
NO_AGENT = "No available agent"
STOP_SECONDS = 30.0  # Ray kills a job that has not ended 3 s after the request
RUN_KEY, STORAGE_KEY = "smolray_run", "smolray_storage"


class JobsError(ValueError):
    """The cluster refused, cannot be reached, or could not run the job; the message says what to do."""


def open_client(address: str) -> "JobSubmissionClient":
    """A client of the cluster's job server, checked to answer. Raises JobsError: wrong address, no or wrong token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise JobsError(f"address {address!r} is no URL of a job server: expected http://HEAD:8265")
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except AuthenticationError as error:
        raise JobsError(
            f"{address} refused the token: {_first_line(error)}; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise JobsError(f"no job server answers at {address}: {_first_line(error)}") from None
    return client


def submit(client: "JobSubmissionClient", config: RunConfig, arguments: Sequence[str], working_dir: str = ".") -> str:
    """Submit `python -m smolray train ARGUMENTS` for the run of `config`; returns the job's id.

    Raises JobsError for what cannot work: see `check_submission`; a run that a job is training already; an upload the
    cluster refuses.
    """
    check_submission(config, arguments, working_dir)
    if active := active_jobs(client, config):
        raise JobsError(
            f"run {config.name} is being trained by job {active[0].submission_id} ({active[0].status.value}); "
            "stop it, or take another name"
        )
    try:
        with job_environment(working_dir, arguments, config.resources.uv) as (environment, words):
            named = {RUN_KEY: config.name, STORAGE_KEY: config.storage}
            return _submitted(client, entrypoint=shlex.join([*ENTRY, *words]), runtime_env=environment, metadata=named)
    except (RuntimeError, ValueError) as error:
        if "413" in str(error) or "exceeds" in str(error):
            folder = Path(working_dir).resolve()
            raise JobsError(
                f"{folder} is too large to upload: name data and outputs in .rayignore ({_first_line(error)})"
            ) from None
        raise JobsError(f"the cluster refused the job: {_first_line(error)}") from None


def _submitted(client: "JobSubmissionClient", **job: Any) -> str:
    """The id of the job, which is submitted again while the head has no agent yet to start it."""
    deadline, told = time.monotonic() + AGENT_SECONDS, False
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        if not told:
            logger.warning("the head has just started: waiting up to %.0f s for its agent", AGENT_SECONDS)
            told = True
        time.sleep(1)


def check_submission(config: RunConfig, arguments: Sequence[str], working_dir: str = ".") -> None:
    """Raise JobsError for arguments that must fail on the cluster: paths of this machine, and credentials.

    A job runs in a copy of what was uploaded, which is deleted after it.
    """
    paths = {
        "storage": config.storage,
        "data.shards": config.data.shards,
        "data.validation": config.data.validation,
        "model.path": config.model.path,
        **config.data.train_paths,
    }
    given = paths | {word.partition("=")[0]: word.partition("=")[2] for word in arguments if "=" in word}
    faults = [fault for key, value in paths.items() if (fault := _path_fault(key, value))]
    faults += [
        f"{key} carries credentials, which the job list would show: give them to the nodes"
        for key, value in given.items()
        if _has_credentials(value)
    ]

    root, file = Path(working_dir).resolve(), config_argument(arguments)
    relative = storage.is_local(file) and not Path(file).is_absolute() and file not in recipes()
    if is_checkout(root) and relative and not (root / file).resolve().is_relative_to(root):
        faults.append(f"--config {file} is outside the uploaded folder {root}: put it there")
    if faults:
        raise JobsError("\n".join(faults))


def _path_fault(key: str, value: str) -> str:
    """Why a path cannot be used by a job; empty for URIs, absolute paths and what is no path of this machine."""
    if not value or "://" in value or Path(value).is_absolute():
        return ""
    remedy = "give s3://… or an absolute path that all nodes share"
    if key == "storage":
        return f"storage = {value!r} is relative: it would be in the job's own folder, which is deleted; {remedy}"
    if value.startswith((".", "~")) or Path(value).exists():
        return f"{key} = {value!r} is a path of this machine: {remedy}"
    return ""


def find_jobs(client: "JobSubmissionClient", name: str, storage_uri: str) -> list["JobDetails"]:
    """Jobs of the run, newest first.

    They are known by the metadata of `submit`, by a submission id that is the name, or by the name in the command.
    """
    found = [job for job in client.list_jobs() if job.submission_id and _is_job_of(job, name, storage_uri)]
    return sorted(found, key=lambda job: -(job.start_time or 0))


def active_jobs(client: "JobSubmissionClient", config: RunConfig) -> list["JobDetails"]:
    """Jobs that train the run now, newest first."""
    jobs = [job for job in find_jobs(client, config.name, config.storage) if not job.status.is_terminal()]
    return [job for job in jobs if not is_lost(client, job)]


def is_lost(client: "JobSubmissionClient", job: "JobDetails") -> bool:
    """Whether the node that the job's driver ran on is gone.

    After a head has restarted, Ray calls such a job RUNNING for two more minutes.
    """
    return (
        not job.status.is_terminal()
        and job.driver_node_id is not None
        and job.driver_node_id not in living_nodes(client)
    )


def living_nodes(client: "JobSubmissionClient") -> set[str]:
    """Ids of the cluster's living nodes. Raises JobsError where it does not answer."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        return {node.node_id for node in list_nodes(client.get_address(), timeout=10) if node.state == "ALIVE"}
    except (RayStateApiException, RuntimeError, OSError) as error:
        raise JobsError(f"{client.get_address()} does not list its nodes: {_first_line(error)}") from None


def _is_job_of(job: "JobDetails", name: str, storage_uri: str) -> bool:
    metadata = job.metadata or {}
    if RUN_KEY in metadata:
        return metadata[RUN_KEY] == name and metadata.get(STORAGE_KEY, storage_uri).rstrip("/") == storage_uri.rstrip(
            "/"
        )
    words = [word.strip("\"'") for word in (job.entrypoint or "").split()]
    named = f"name={name}" in words or any(word.endswith(f"/{name}/{CONFIG}") for word in words)
    trains = {"smolray", "train"} <= set(words) or any(word.endswith(JOB_FILE) for word in words)
    return job.submission_id == name or (named and trains)


def stop_jobs(client: "JobSubmissionClient", name: str, storage_uri: str, patience: float = 30.0) -> list[str]:
    """Give the jobs of a run that has saved `patience` seconds to end by themselves, then stop them.

    Returns a line for each job that says what happened.
    """
    lines = []
    for job_id in [
        str(job.submission_id) for job in find_jobs(client, name, storage_uri) if not job.status.is_terminal()
    ]:
        if _ends_within(client, job_id, patience):
            lines.append(f"job {job_id} ended by itself")
            continue
        client.stop_job(job_id)  # returns at once; until the job is gone, the run's name is taken
        lines.append(
            f"job {job_id} stopped"
            if _ends_within(client, job_id, STOP_SECONDS)
            else f"job {job_id} was asked to stop and has not ended yet"
        )
    return lines


def _ends_within(client: "JobSubmissionClient", job_id: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job_id).is_terminal():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def follow(client: "JobSubmissionClient", job_id: str, retry_seconds: float = 3.0, attempts: int = 40) -> Iterator[str]:
    """The job's output as it comes, until the job ends or its driver is lost.

    When the head restarts the stream breaks; it is then continued where it was.

    Raises JobsError where the cluster has not answered for `attempts` tries.
    """
    printed, failures = 0, 0
    while True:
        position = 0
        try:
            with asyncio.Runner() as runner:
                stream = client.tail_job_logs(job_id)
                while True:
                    try:
                        text = runner.run(_next(stream, client))
                    except StopAsyncIteration:
                        break
                    fresh = text[max(0, printed - position) :]
                    position += len(text)
                    printed, failures = max(printed, position), 0
                    yield fresh
            job = client.get_job_info(job_id)
            if job.status.is_terminal() or is_lost(client, job):
                return
        except (ConnectionError, RuntimeError, OSError, JobsError) as error:
            failures += 1
            if failures >= attempts:
                raise JobsError(
                    f"job {job_id} cannot be followed any more: {_first_line(error)}; "
                    "`smolray status` reads its storage"
                ) from None
        time.sleep(retry_seconds)


async def _next(stream: AsyncIterator[str], client: "JobSubmissionClient") -> str:
    """The next piece of output.

    A head without power closes no connection: after some silence it is asked for a sign of life.
    """
    piece = asyncio.ensure_future(anext(stream))
    address = urlsplit(client.get_address())
    while not (await asyncio.wait({piece}, timeout=STALLED_SECONDS))[0]:
        try:
            _, writer = await asyncio.wait_for(
                asyncio.open_connection(address.hostname, address.port or 80), STALLED_SECONDS
            )
            writer.close()
        except OSError:  # TimeoutError is one
            piece.cancel()
            raise
    return piece.result()


def _has_credentials(text: str) -> bool:
    """A URI with a user, or with keys in its query; or the form of a key of AWS or Hugging Face."""
    _, there, rest = text.partition("://")
    in_uri = there and (
        "@" in rest.split("/", 1)[0] or re.search(r"[?&](access_key|secret_key|session_token|token|password)=", rest)
    )
    return bool(in_uri or re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{20,}", text))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
