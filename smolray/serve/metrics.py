"""What Prometheus reads of the service.

In: requests as they end, and the states of the engines. Out: the text format.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {
    "running": "answers that are decoded now",
    "waiting": "answers that wait for a slot",
    "pages": "pages for keys and values",
    "pages_in_use": "pages that answers use",
    "answers": "answers that were finished",
    "failed": "answers that failed",
    "cancelled": "answers that were given up because the client had left",
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that had been computed before",
    "answer_tokens": "tokens of answers",
    "images_encoded": "images that went through the vision tower",
    "passes": "passes through the text model",
}


class Metrics:
    """The numbers of one process that answers HTTP."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "smolray_requests",
            "requests by model, path and status",
            ("model", "path", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "smolray_request_seconds",
            "from a request to its end",
            ("model", "path"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_seconds = Histogram(
            "smolray_first_piece_seconds", "to the first text", ("model",), buckets=SECONDS, registry=self.registry
        )
        self.open = Gauge("smolray_open_requests", "requests that are not finished", registry=self.registry)
        self.engines = {
            name: Gauge(f"smolray_engine_{name}", f"{text}, all replicas", ("model",), registry=self.registry)
            for name, text in GAUGES.items()
        }

    def text(self, states: Mapping[str, Sequence[Mapping[str, int]]]) -> bytes:
        """All numbers. `states`: of each model, the states of its replicas."""
        for model, of_replicas in states.items():
            for name, gauge in self.engines.items():
                gauge.labels(model).set(sum(state.get(name, 0) for state in of_replicas))
        return generate_latest(self.registry)
