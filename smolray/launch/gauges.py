"""The newest numbers of a run as gauges of Ray, which Ray's agent on the node gives to Prometheus.

In: the steps of rank 0. Out: `ray_smolray_<name>{run="…"}`; cluster/grafana has a dashboard of them. ray.train.report
is not used: in Ray 2.60 it is a barrier of all workers, and the dashboard's Train tab shows nothing of what it is told.
"""

from dataclasses import dataclass

from ray.util.metrics import Gauge

from smolray.train.step import StepInfo, StepMetrics

SECONDS = 1.0  # of training between two values; Ray sends them every 10 s
GAUGES = {
    "step": "optimizer steps that are done",
    "total_steps": "optimizer steps of the whole run",
    "epoch": "passes over the data that are done",
    "loss": "loss of the newest step",
    "grad_norm": "norm of its gradients before they are clipped",
    "learning_rate": "its learning rate",
    "samples_per_second": "conversations trained a second",
    "tokens_per_second": "tokens trained a second, padding included",
    "data_wait_ratio": "share of the time that training waits for data",
    "memory_bytes": "peak bytes of the busiest worker",
}


@dataclass
class Rates:
    """What was trained since the last values, and in how much time."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, metrics: StepMetrics) -> None:
        """Count a step."""
        self.samples, self.tokens = self.samples + metrics.samples, self.tokens + metrics.tokens
        self.seconds, self.waited = self.seconds + metrics.seconds, self.waited + metrics.data_wait_seconds

    def values(self, newest: StepMetrics) -> dict[str, float]:
        """The value of each gauge."""
        seconds = max(self.seconds, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_ratio": self.waited / seconds,
        }
        return {name: float(rates[name] if name in rates else getattr(newest, name)) for name in GAUGES}


class StepGauges:
    """A hook of the training loop on rank 0: after each second of training, and at the end, all gauges get values."""

    def __init__(self, run: str):
        self.gauges = {name: Gauge(f"smolray_{name}", about, tag_keys=("run",)) for name, about in GAUGES.items()}
        self.tags, self.rates = {"run": run}, Rates()

    def __call__(self, step_info: StepInfo) -> None:
        self.rates.add(step_info.metrics)
        if self.rates.seconds < SECONDS and not step_info.last:
            return
        for name, value in self.rates.values(step_info.metrics).items():
            self.gauges[name].set(value, self.tags)
        self.rates = Rates()
