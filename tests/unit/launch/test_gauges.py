"""The gauges of a run: what a dashboard asks for exists, and what exists is on the dashboard."""

import json
import re
from pathlib import Path

import pytest

from smolray.launch.gauges import GAUGES, Rates
from tests.steps import step_metrics

DASHBOARD = Path(__file__).parents[3] / "cluster" / "grafana" / "smolray.json"


def test_rates_are_those_of_all_steps_since_the_last_values():
    rates = Rates()
    for number in (1, 2, 3):
        rates.add(step_metrics(number, seconds=0.5, samples=8, tokens=100, data_wait_seconds=0.1))
    values = rates.values(step_metrics(3, loss=0.25))
    assert values.keys() == GAUGES.keys()
    assert (values["step"], values["loss"]) == (3.0, 0.25)
    assert (values["samples_per_second"], values["tokens_per_second"]) == (16.0, 200.0)
    assert values["data_wait_ratio"] == pytest.approx(0.2)


def test_the_dashboard_shows_every_gauge_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_smolray_(\w+)", asked)) == set(GAUGES)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
