"""What Prometheus reads of Ray's agent while a run trains."""

import time
import urllib.request

from smolray.launch.gauges import GAUGES


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_the_numbers_of_a_run_reach_prometheus(ray_cluster):
    @ray_cluster.remote(num_cpus=0.1)
    class Worker:
        def train(self):
            from types import SimpleNamespace

            from smolray.launch.gauges import StepGauges
            from smolray.train.step import StepInfo
            from tests.steps import step_metrics

            self.gauges = StepGauges("mine")
            metrics = step_metrics(3, loss=0.25, seconds=2.0)
            self.gauges(StepInfo(SimpleNamespace(), metrics, SimpleNamespace(), False, False, False))

    worker = Worker.remote()
    ray_cluster.get(worker.train.remote())
    (port,) = {node["MetricsExportPort"] for node in ray_cluster.nodes() if node["Alive"]}
    deadline = time.monotonic() + 60
    found = {}
    while found.keys() != {f"ray_smolray_{name}" for name in GAUGES} and time.monotonic() < deadline:
        time.sleep(1)
        lines = [line for line in scraped(port).splitlines() if line.startswith("ray_smolray_")]
        found = {line.partition("{")[0]: line for line in lines if 'run="mine"' in line}  # others trained here too
    assert found.keys() == {f"ray_smolray_{name}" for name in GAUGES}
    assert found["ray_smolray_loss"].endswith(" 0.25")
    assert found["ray_smolray_samples_per_second"].endswith(" 4.0")
