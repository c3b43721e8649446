"""One run in its driver: who owns it, who asks it to stop, and whether its Ray still lives.

In: a config. Out: a block in which this process owns the run; an error raised in the main thread where the run has been
lost; a request to save where the workers train; the last event of a run that ends before they do.

It begins before Ray and torch are imported, so that `smolray status` and `stop` know a run from its first second.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from smolray import storage
from smolray.cluster.local_ray import LOCAL_RAY
from smolray.cluster.signals import Stopped, StopSignals, stop_signals
from smolray.config import ConfigError, RunConfig, to_yaml
from smolray.launch.background import in_background
from smolray.run.events import STARTING, EventLog, read_events
from smolray.run.folder import RunFolder
from smolray.run.lease import Lease, LeaseLostError, owning
from smolray.run.result import read_result
from smolray.run.status import clear_stop, request_stop, stop_requested
from smolray.tracking.notify import notified
from smolray.tracking.registry import check_tracking

LOOK_SECONDS = 1.0
WAITING_SECONDS = 4.0  # between two looks at what the workers wait for
HEAD_SECONDS = 45.0  # Ray ends a driver whose head has been away for 60 s, in words of its own
VERDICT_SECONDS = 3.0  # after an error of Ray, until it is known whether its processes live
NOTICE = b"\nstopping: the run saves first; once more to end at once\n"


class RunError(ValueError):
    """The run failed in a way that a restart of its workers does not repair, such as a non-finite loss."""


class ClusterLostError(RuntimeError):
    """Ray has died under a run; the message says what died, what is safe and how to go on."""


@contextmanager
def started_run(config: RunConfig) -> Iterator["Session"]:
    """A block in which this process owns the run.

    The run's log says that it has begun, and at its end how it has ended.

    Raises:
        LeaseError: another process trains this run; LeaseLostError: another one has taken it over.
        ConfigError: there is nothing to train on, or nowhere to write.
        ClusterLostError: Ray has died.
        Stopped: Ctrl-C or SIGTERM ended it, after it has saved.
    """
    refuse_lost_storage(config)
    if not config.data.train:
        raise ConfigError("data.train is not set; expected a path, URI or hub data set id with training data")
    config = config.replace({"storage": storage.absolute(config.storage)})
    storage.require_writable(config.storage, "storage")
    check_tracking(config)

    owned = owning(config.run_dir, "train")
    with stop_signals() as signals, owned as lease, notified(config, partial(print, flush=True)):
        session = Session(config, lease, signals)
        try:
            with session.watching():
                session.begin()
                yield session
        except Stopped:
            raise session.stopped() from None
        except LeaseLostError:
            raise
        except Exception as error:
            if loss := lease.loss():
                raise loss from None
            dead = session.found_dead(error)
            told = dead or error
            session.failed(
                str(told) if isinstance(told, RunError | ClusterLostError) else f"{type(told).__name__}: {told}"
            )
            if dead:
                raise dead from None
            raise
        if signals.number:
            raise Stopped(f"{config.name} has ended. {session.how_to_go_on()}", signals.code)


def refuse_lost_storage(config: RunConfig) -> None:
    """Raise ConfigError where a Ray job would write its run into a folder that is deleted with the job."""
    if (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        and storage.is_local(config.storage)
        and not Path(config.storage).expanduser().is_absolute()
    ):
        raise ConfigError(
            f"storage = {config.storage!r} in a submitted job is a folder of its temporary working directory; "
            "expected an absolute path that all nodes share, or s3://bucket/runs"
        )


class Session:
    """The driver's side of one run, from its first second to its end.

    Attributes:
        training: The workers have the run: a request to stop is left to them once they train.
        begun: The log says that this session has begun, so it must say how it ends.
    """

    def __init__(self, config: RunConfig, lease: Lease, signals: StopSignals) -> None:
        self.config, self.lease, self.signals = config, lease, signals
        self.run_dir = config.run_dir
        self.begun = False
        self.training = False
        self.joined = not _connected()  # whether the connection to Ray is ours to cut
        self._head_seen = time.monotonic()

    def begin(self) -> None:
        """Write config.yaml and the first event, so that `status` and `stop` know the run."""
        folder = RunFolder(self.run_dir)
        storage.delete(folder.stop_flag)
        self.signals.notice, self.signals.last_words = NOTICE, self._last_words
        if read_result(self.run_dir).get("status") == "finished":
            return  # then nothing is written, unless its settings have changed
        if not storage.exists(folder.config):
            storage.write_bytes(folder.config, to_yaml(self.config).encode())
        EventLog(self.run_dir).write("preparing")
        self.begun = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which the run is watched from a thread. Faults are raised in the main thread."""
        with in_background(self._watch):
            yield

    @contextmanager
    def workers(self, config: RunConfig) -> Iterator[None]:
        """A block in which the workers have the run. `config`: as it is trained."""
        self.begun = self.training = self.signals.patient = True
        from smolray.data.ray_context import cluster_capacity
        from smolray.launch.resources import use_gpu, worker_resources

        each = worker_resources(config, use_gpu(config, cluster_capacity()))
        with in_background(partial(self._tell_waiting, config.resources.workers[0], each)):
            yield

    def stopped(self) -> Stopped:
        """End a run that was asked to stop before its workers could: cut them off, say so in its log."""
        if self.joined and _connected():
            import ray

            ray.shutdown()
        if self.begun:
            EventLog(self.run_dir).write("end", status="stopped", step=self._newest_step())
            clear_stop(self.run_dir)
        return Stopped(f"{self.config.name} stopped. {self.how_to_go_on()}", self.signals.code)

    def failed(self, error: str) -> None:
        """Write into the run's log that it failed, why, and where its workers' own output is."""
        if self.begun:
            EventLog(self.run_dir).write("end", status="failed", error=error[:2000], **_logs())

    def how_to_go_on(self) -> str:
        """What is safe, and what to type."""
        step = self._newest_step()
        safe = f"Safe: step {step}, in {RunFolder(self.run_dir).checkpoint(step)}" if step else "No step was saved"
        where = self.run_dir.rsplit("/", 1)[0]
        return f"{safe}. To go on: smolray resume {self.config.name} --storage {where}"

    def lost(self, what: str) -> ClusterLostError:
        """The error of a run whose Ray has died."""
        return ClusterLostError(f"{what}. {self.how_to_go_on()}")

    def found_dead(self, error: Exception) -> ClusterLostError | None:
        """The error of a run whose Ray has died, where `error` may be a consequence of that; else None."""
        if isinstance(error, ClusterLostError):
            return error
        if type(error).__module__.split(".")[0] != "ray" and not isinstance(error, ConnectionError):
            return None
        deadline = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < deadline and LOCAL_RAY.process is not None:
            if LOCAL_RAY.died:
                return self.lost(f"a process of the local Ray has died: {', '.join(LOCAL_RAY.died)}")
            time.sleep(0.2)
        return None

    def fault(self) -> BaseException | None:
        """Why this session cannot go on; None where it can."""
        if loss := self.lease.loss():
            return loss
        if LOCAL_RAY.died:
            return self.lost(f"a process of the local Ray has died: {', '.join(LOCAL_RAY.died)}")
        if self.head_is_away():
            return self.lost(f"the head of the cluster has not answered for {HEAD_SECONDS:.0f} s")
        if not self.signals.number and not stop_requested(self.run_dir):
            return None
        if not self.training:
            return Stopped("", self.signals.code)
        if self.signals.number and not stop_requested(self.run_dir):
            request_stop(self.run_dir)
        return Stopped("", self.signals.code) if self.joined and not self._workers_train() else None

    def head_is_away(self) -> bool:
        """Whether the head of a cluster has not answered for a while."""
        if not _connected() or LOCAL_RAY.process is not None:
            return False
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 5.0):
            self._head_seen = time.monotonic()
        return time.monotonic() - self._head_seen > HEAD_SECONDS

    def _workers_train(self) -> bool:
        """Whether the workers will see a request to stop soon.

        Not while they start, nor while they evaluate, which saves before it begins.
        """
        events = [e["event"] for e in read_events(self.run_dir)]
        return bool(events) and events[-1] not in (*STARTING, "evaluating")

    def _newest_step(self) -> int:
        """The step of the newest whole checkpoint, 0 where there is none."""
        if not storage.list_dirs(RunFolder(self.run_dir).checkpoints):
            return 0
        from smolray.run import checkpoint  # imports torch

        found = checkpoint.latest(self.run_dir)
        return found.step if found else 0

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(LOOK_SECONDS if storage.is_local(self.run_dir) else 5 * LOOK_SECONDS):
            with suppress(Exception):  # a storage or a head that is away for a moment: look again
                if error := self.fault():
                    self.signals.interrupt(error)
                    return

    def _tell_waiting(self, workers: int, each: dict[str, float], over: threading.Event) -> None:
        """Until the workers have started, say in the log what they wait for."""
        from ray.exceptions import RayError

        from smolray.launch.waiting import waits_for

        told = ""
        while not over.wait(WAITING_SECONDS):
            with suppress(OSError, RayError):
                log = EventLog(self.run_dir)
                if log.newest not in STARTING:
                    return
                if (what := waits_for(workers, each)) and what != told:
                    told = what
                    log.write("waiting", what=what)

    def _last_words(self) -> None:
        if self.begun:
            EventLog(self.run_dir).write("end", status="stopped", step=self._newest_step())
        self.lease.release()


def _connected() -> bool:
    """Whether this process is connected to a Ray; without importing it."""
    is_initialized = getattr(sys.modules.get("ray"), "is_initialized", None)  # not there yet while it is imported
    return is_initialized is not None and bool(is_initialized())


def _logs() -> dict[str, str]:
    """The field `logs` of an event: where the workers' own output is."""
    if not _connected():
        return {}
    from smolray.cluster.connect import worker_logs

    return {"logs": worker_logs()}
