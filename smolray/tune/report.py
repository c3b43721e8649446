"""The report of a search as one HTML file that opens with no network.

In: the log of the trials. Out: `<search>/report.html`.
"""

import json
import time
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

from smolray import storage
from smolray.config import RunConfig
from smolray.report.charts import Series, line_chart
from smolray.report.style import STYLE
from smolray.run.events import Event, read_events
from smolray.run.progress import duration, percent, size
from smolray.tune.log import FILE, TrialRecord, best_trial, read_trials
from smolray.tune.parallel_coordinates import parallel_coordinates
from smolray.tune.proposals import new_study, past_trial
from smolray.tune.space import Space

BEST, CURVES = 10, 5
FEWEST_FOR_IMPORTANCE = 6  # trials with a value; of fewer nothing can be said


def write_report(folder: str, config: RunConfig, space: Space) -> str:
    """Write `report.html` of the search in `folder` and return its URI."""
    uri = storage.join(folder, "report.html")
    storage.write_bytes(uri, render(config, space, read_trials(folder), read_events(folder, FILE)).encode())
    return uri


def render(config: RunConfig, space: Space, trials: Sequence[TrialRecord], events: Sequence[Event]) -> str:
    """The page as text; pure."""
    assert config.search is not None
    metric = config.search.metric
    body = [
        _head(config, trials, events),
        _best(trials, config),
        _settings(trials, config, space),
        _curves(trials, events, config),
        _all(trials, metric),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(config.name)} · smolray search</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def importances(trials: Sequence[TrialRecord], config: RunConfig, space: Space) -> dict[str, float]:
    """How much each setting matters for being among the better trials (PED-ANOVA, Watanabe et al. 2023), the most
    important first.

    Empty where too few trials have a value or all have the same.
    """
    import optuna

    assert config.search is not None
    valued = [(v, t) for t in trials if (v := t.value(config.search.metric)) is not None and not t.exploits]
    if (
        len(valued) < FEWEST_FOR_IMPORTANCE
        or len({v for v, _ in valued}) == 1
        or any(set(t.settings) != set(space) for _, t in valued)
    ):
        return {}
    study = new_study(config.replace({"search.second_objective": None}), len(valued))
    study.add_trials([past_trial(space, trial, [value]) for value, trial in valued])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    return {key: float(value) for key, value in found.items()}


def _head(config: RunConfig, trials: Sequence[TrialRecord], events: Sequence[Event]) -> str:
    search = config.search
    assert search is not None
    starts = [e for e in events if e["event"] == "start"]
    total = starts[-1]["trials"] if starts else len(trials)
    ended = sum(t.ended for t in trials)
    status = "finished" if ended >= total else "running"
    counts = {kind: sum(t.status == kind for t in trials) for kind in ("finished", "stopped", "failed", "running")}
    wall = events[-1]["time"] - events[0]["time"] if events else 0.0
    facts = {
        "Model": config.model.path,
        "Data": config.data.train,
        "Algorithm": f"{search.algorithm}, {search.scheduler}",
        "Trials": f"{ended} of {total}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n),
        "Steps": f"{sum(t.steps for t in trials):,}",
        "Cost": f"{sum(t.worker_minutes for t in trials):.1f} worker minutes of training",
        "From first to last": duration(wall),
        "Sessions": len(starts),
        "Started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(events[0]["time"])) if events else "",
    }
    planned = [t.gpu_minutes for t in trials if t.gpu_minutes]
    facts["Planned"] = f"{sum(planned):.0f} GPU minutes for {len(planned)} whole trials" if planned else ""
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v != "")
    return (
        f'<header><h1>{escape(config.name)} <span class="badge {status}">{status}</span></h1><dl>{listed}</dl></header>'
    )


def _best(trials: Sequence[TrialRecord], config: RunConfig) -> str:
    assert config.search is not None
    metric, second = config.search.metric, config.search.second_objective
    best = best_trial(trials, metric)
    if best is None:
        return '<section><h2>Best trials</h2><p class="quiet">No trial has been evaluated yet.</p></section>'
    valued = sorted(
        ((v, t) for t in trials if (v := t.value(metric)) is not None),
        key=lambda p: (p[0] if metric == "loss" else -p[0], p[1].steps),
    )
    front = _front([(v, t.second(second) or 0.0) for v, t in valued], metric) if second else []
    rows = "".join(
        _row(trial, metric, " *" if rank < len(front) and front[rank] else "")
        for rank, (_, trial) in enumerate(valued[:BEST])
    )
    note = (
        f"<p class='quiet'>* on the front of {escape(metric)} and {second}: no other trial is better in both.</p>"
        if second
        else ""
    )
    head = f'<div class="headline"><b>{_value(best.value(metric), metric)}</b><span>{escape(metric)} of trial {best.number}, see best.yaml</span></div>'
    return f'<section><h2>Best trials</h2>{head}{note}<table style="margin-top:16px">{_columns(metric)}<tbody>{rows}</tbody></table></section>'


def _front(points: list[tuple[float, float]], metric: str) -> list[bool]:
    """Which (value, second objective) no other beats in both; the second is the better the lower."""
    sign = 1 if metric == "loss" else -1
    lowered = [(sign * v, s) for v, s in points]
    return [not any(v <= mine[0] and s <= mine[1] and (v, s) != mine for v, s in lowered) for mine in lowered]


def _settings(trials: Sequence[TrialRecord], config: RunConfig, space: Space) -> str:
    assert config.search is not None
    chart = parallel_coordinates(trials, space, config.search.metric)
    if not chart:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{percent(value)}</td><td class="bar"><i style="width:{100 * value:.1f}%"></i></td></tr>'
        for key, value in importances(trials, config, space).items()
    )
    table = f'<h2 style="margin-top:22px">Importance</h2><table><tbody>{rows}</tbody></table>' if rows else ""
    return f'<section><h2>Settings</h2><div class="charts">{chart}</div>{table}</section>'


def _curves(trials: Sequence[TrialRecord], events: Sequence[Event], config: RunConfig) -> str:
    assert config.search is not None
    metric = config.search.metric
    valued = sorted(
        (t for t in trials if t.value(metric) is not None),
        key=lambda t: (t.value(metric) or 0.0) * (1 if metric == "loss" else -1),
    )
    show = "{:.0%}".format if metric == "accuracy" else "{:.3g}".format
    lines = [
        Series(f"trial {t.number}", tuple((r["step"], r[metric]) for r in t.reports), dots=True)
        for t in valued[:CURVES]
    ]
    lines += [
        Series(f"trial {t.number}", tuple((r["step"], r[metric]) for r in t.reports), faint=True)
        for t in valued[CURVES:]
    ]
    charts = [line_chart(f"Learning curves ({metric}; the best {min(CURVES, len(valued))} in colour)", lines, show)]
    best, so_far, paid = None, [], 0.0
    cost: dict[int, float] = {}
    for event in events:
        if event["event"] == "report":
            value = event[metric]
            best = value if best is None else (min if metric == "loss" else max)(best, value)
            before = cost.get(event["number"], 0.0)
            cost[event["number"]] = event["seconds"]
            paid += (event["seconds"] - before) * event.get("workers", 1) / 60
            so_far.append((paid, best))
    charts.append(
        line_chart(f"Best {metric} so far", [Series("best", tuple(so_far))], show, x_label="worker minutes of training")
    )
    spent = tuple((float(t.number), t.worker_minutes) for t in trials if t.reports)
    charts.append(
        line_chart(
            "Cost of each trial, worker minutes",
            [Series("cost", spent, dots=True)],
            y_limits=(0.0, None),
            x_label="trial",
        )
    )
    return f'<section><h2>Over time</h2><div class="charts">{"".join(charts)}</div></section>'


def _all(trials: Sequence[TrialRecord], metric: str) -> str:
    rows = "".join(_row(trial, metric) for trial in trials)
    return (
        f"<section><details><summary>All trials</summary><table>{_columns(metric)}<tbody>{rows}</tbody></table></details></section>"
        if rows
        else ""
    )


def _columns(metric: str) -> str:
    names = ("Trial", "State", metric, "Steps", "Training", "Memory", "Settings")
    return "<thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr></thead>"


def _row(trial: TrialRecord, metric: str, mark: str = "") -> str:
    memory = trial.second("memory")
    shown = {
        k.rsplit(".", 1)[-1]: f"{v:.4g}" if isinstance(v, float) else json.dumps(v) for k, v in trial.settings.items()
    }
    told = ", ".join(f"{key} {value}" for key, value in shown.items())
    told += "".join(f"; took over {e['origin']}" for e in trial.exploits) + (
        f"; {trial.reason}" if trial.reason else ""
    )
    cells: list[Any] = [
        f"{trial.number}{mark}",
        trial.status,
        _value(trial.value(metric), metric),
        f"{trial.steps:,}",
        duration(trial.seconds),
        size(memory * 2**30) if memory else "",
        told,
    ]
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _value(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return percent(value) if metric == "accuracy" else f"{value:.4g}"
