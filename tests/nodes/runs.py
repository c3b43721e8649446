"""A run over nodes, observed from outside through its events.

In: a submission from the laptop. Out: steps, seconds and the final check.
"""

import sys
import time
from collections import Counter
from itertools import pairwise

from smolray.run import checkpoint
from smolray.run.events import read_events, surviving
from smolray.run.folder import RunFolder
from smolray.train.audit import consumed
from tests.nodes.conftest import QUESTIONS, ROOT

EPOCHS = 2
SAVE_STEPS = 10
LOSS_SECONDS = 60  # the goal: from the loss of a node to the next step, on two cores
WATCH = """
import sys
from smolray.config import load_config
from smolray.cluster.jobs import open_client
from smolray.cluster.resubmit import submit_until_ended
arguments = sys.argv[2:]
for text in submit_until_ended(open_client(sys.argv[1]), load_config(arguments[1], arguments[2:]), arguments):
    print(text, end="", flush=True)
"""


def settings(name, storage, data, epochs=EPOCHS):
    """Arguments of a small elastic run that audits every step: 1,500 questions, one worker a node."""
    return [
        "--config",
        "demo",
        f"name={name}",
        f"storage={storage}/runs",
        f"data.train={data}/train.parquet",
        "model.path=tiny",
        "train.per_device_train_batch_size=8",
        "train.global_batch=2",
        f"train.num_train_epochs={epochs}",
        "train.audit=true",
        f"checkpoint.save_steps={SAVE_STEPS}",
        "evaluate.eval_epochs=0",
        "resources.num_workers=[1,2]",
        "resources.cpus_per_worker=0.6",
        "resources.max_failures=5",
    ]


def check_history(events, history, epochs=EPOCHS):
    """It has finished, no step is missing or there twice, and each epoch consumed every sample exactly once."""
    assert events[-1]["event"] == "end" and events[-1]["status"] == "finished", events[-1]
    steps = [e["step"] for e in surviving(events) if e["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert sorted(history) == list(range(epochs))
    for rows in history.values():
        assert Counter(i for _, i in rows) == Counter(f"train-{i}" for i in range(QUESTIONS))


class Run:
    """A run on a folder that all nodes see, submitted from the laptop by the watcher that keeps it alive."""

    def __init__(self, cluster, shared, name, *overrides, epochs=EPOCHS):
        self.cluster, self.name, self.epochs, self.run_dir = cluster, name, epochs, f"{shared}/runs/{name}"
        self.log = cluster.lan["laptop"].folder / "srv" / f"{name}.log"
        environment = [
            f"{k}={v}"
            for k, v in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token, "PYTHONPATH": str(ROOT)}.items()
        ]
        command = ["env", "-C", str(ROOT), *environment, sys.executable, "-c", WATCH, cluster.address]
        self.process = cluster.lan["laptop"].start(
            *command, *settings(name, shared, shared, epochs), *overrides, log=f"{name}.log"
        )

    def events(self, kind):
        return [e for e in read_events(self.run_dir) if e["event"] == kind]

    def wait(self, done, seconds, what):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.told()}"
            assert self.process.poll() is None or done(), (
                f"{what}: the watcher ended with {self.process.poll()}\n{self.told()}"
            )
            time.sleep(0.3)

    def told(self):
        return (
            self.log.read_text()[-4000:]
            + str([e for e in read_events(self.run_dir) if e["event"] != "step"][-6:])
            + self.cluster.logs()[-3000:]
        )

    def reaches(self, step, seconds=240):
        self.wait(lambda: any(e["step"] >= step for e in self.events("step")), seconds, f"step {step}")

    def trains_again_after(self, step_info, seconds=240):
        """Seconds from `moment` to the first step of a later attempt."""
        before = max(e["attempt"] for e in self.events("start"))

        def again():
            return [e["time"] for e in self.events("step") if e["time"] > step_info and e["attempt"] > before]

        self.wait(again, seconds, "training again")
        return min(again()) - step_info

    def interruptions(self):
        """Seconds without a step between one attempt and the next, restarts, and what was trained twice, included."""
        steps = self.events("step")
        return [round(b["time"] - a["time"], 1) for a, b in pairwise(steps) if b["attempt"] > a["attempt"]]

    def ends(self, seconds=400):
        """The exit code of the watcher."""
        self.wait(lambda: self.process.poll() is not None, seconds, "the end")
        return self.process.returncode

    def finishes(self, seconds=400):
        assert self.ends(seconds) == 0, self.told()
        check_history(read_events(self.run_dir), consumed(self.run_dir), self.epochs)
        for step in checkpoint.list_steps(self.run_dir):
            checkpoint.verify(RunFolder(self.run_dir).checkpoint(step))
        print(f"{self.name}: seconds without a step: {self.interruptions()}")
