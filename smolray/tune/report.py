"""The report of a search as one HTML file that opens with no network.

In: the log of the trials. Out: `<search>/report.html`.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from smolray import storage
from smolray.config import RunConfig, load_config
from smolray.report.charts import Point, Series, line_chart
from smolray.report.page import render
from smolray.report.sections import utc
from smolray.run.events import Event, read_events
from smolray.run.folder import RunFolder, has_log
from smolray.run.progress import duration, percent, size
from smolray.tune.log import FILE, STORED, TrialRecord, best_trial, read_trials, search_folder
from smolray.tune.parallel_coordinates import parallel_coordinates
from smolray.tune.searcher import new_study, past_trial
from smolray.tune.space import Space, read_space

BEST, CURVES = 10, 5
FEWEST_FOR_IMPORTANCE = 6  # trials with a value; fewer say nothing


class TrialRow(NamedTuple):
    """A trial as the tables of the page show it."""

    trial: str
    state: str
    value: str
    steps: str
    training: str
    memory: str
    settings: str


def write_report(folder: str, config: RunConfig, space: Space) -> str:
    """Write `report.html` of the search in `folder` and return its URI."""
    uri = RunFolder(folder).report
    page = report_page(config, space, read_trials(folder), read_events(folder, FILE))
    storage.write_bytes(uri, page.encode())
    return uri


def searches_in(storage_uri: str) -> list[str]:
    """The names of the searches under a storage folder."""
    return [name for name in storage.list_dirs(storage_uri) if has_log(search_folder(storage_uri, name), FILE)]


def read_report(folder: str) -> Markup:
    """The report of the search in `folder` as it is now, to stand inside a page. Raises ConfigError."""
    config = load_config(storage.join(folder, STORED))
    values = _values(config, read_space(config), read_trials(folder), read_events(folder, FILE))
    return render("search_body.html", "smolray.tune", **values)


def report_page(config: RunConfig, space: Space, trials: Sequence[TrialRecord], events: Sequence[Event]) -> str:
    """The page as text. Pure."""
    title = f"{config.name} · smolray search"
    return render("search.html", "smolray.tune", title=title, **_values(config, space, trials, events))


def _values(config: RunConfig, space: Space, trials: Sequence[TrialRecord], events: Sequence[Event]) -> dict[str, Any]:
    """What the templates show."""
    assert config.search is not None
    metric = config.search.metric
    best = best_trial(trials, metric)
    weights = importances(trials, config, space).items()

    return {
        "name": config.name,
        "status": "finished" if _ended(trials) >= _total(trials, events) else "running",
        "facts": _facts(config, trials, events),
        "metric": metric,
        "second_objective": config.search.second_objective,
        "best": _best_rows(trials, config),
        "best_number": best.number if best else None,
        "coordinates": parallel_coordinates(trials, space, metric),
        "importances": [(key, percent(value), f"{100 * value:.1f}%") for key, value in weights],
        "charts": [_learning_curves(trials, metric), _best_so_far(events, metric), _cost_of_each(trials)],
        "trials": [_row(trial, metric) for trial in trials],
    }


def importances(trials: Sequence[TrialRecord], config: RunConfig, space: Space) -> dict[str, float]:
    """The importance of each setting for being among the better trials, the most important first.

    By PED-ANOVA (Watanabe et al. 2023). Empty where too few trials have a value, or all have the same value.
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


def _ended(trials: Sequence[TrialRecord]) -> int:
    return sum(trial.ended for trial in trials)


def _total(trials: Sequence[TrialRecord], events: Sequence[Event]) -> int:
    """Trials of the whole search, as its newest session planned them."""
    starts = [e["trials"] for e in events if e["event"] == "start"]
    return starts[-1] if starts else len(trials)


def _facts(config: RunConfig, trials: Sequence[TrialRecord], events: Sequence[Event]) -> dict[str, str]:
    search = config.search
    assert search is not None
    counts = {kind: sum(t.status == kind for t in trials) for kind in ("finished", "stopped", "failed", "running")}
    states = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    planned = [t.gpu_minutes for t in trials if t.gpu_minutes]

    facts = {
        "Model": config.model.path,
        "Data": ", ".join(source.path for source in config.data.sources),
        "Algorithm": f"{search.algorithm}, {search.scheduler}",
        "Trials": f"{_ended(trials)} of {_total(trials, events)}: {states}",
        "Steps": f"{sum(t.steps for t in trials):,}",
        "Cost": f"{sum(t.worker_minutes for t in trials):.1f} worker minutes of training",
        "From first to last": duration(events[-1]["time"] - events[0]["time"] if events else 0.0),
        "Sessions": str(sum(e["event"] == "start" for e in events)),
        "Started": utc(events[0]["time"]) if events else "",
        "Planned": f"{sum(planned):.0f} GPU minutes for {len(planned)} whole trials" if planned else "",
    }
    return {label: value for label, value in facts.items() if value}


def _by_value(trials: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """The trials that have a value, the best first; among equal values the one with fewer steps."""
    valued = [(v if metric == "loss" else -v, t.steps, t) for t in trials if (v := t.value(metric)) is not None]
    return [trial for *_, trial in sorted(valued, key=lambda item: item[:2])]


def _best_rows(trials: Sequence[TrialRecord], config: RunConfig) -> list[TrialRow]:
    """The best trials. A star marks those on the Pareto front of both objectives."""
    assert config.search is not None
    metric, second = config.search.metric, config.search.second_objective
    valued = _by_value(trials, metric)
    points = [(t.value(metric) or 0.0, t.cost(second) or 0.0) for t in valued] if second else []
    front = _front(points, metric) if second else [False] * len(valued)
    return [_row(trial, metric, " *" if star else "") for trial, star in zip(valued[:BEST], front, strict=False)]


def _front(points: list[tuple[float, float]], metric: str) -> list[bool]:
    """Whether each (value, second objective) is on the Pareto front. A lower second objective is better."""
    sign = 1 if metric == "loss" else -1
    lowered = [(sign * v, s) for v, s in points]
    return [not any(v <= mine[0] and s <= mine[1] and (v, s) != mine for v, s in lowered) for mine in lowered]


def _learning_curves(trials: Sequence[TrialRecord], metric: str) -> Markup:
    valued = _by_value(trials, metric)
    lines = [
        Series(
            f"trial {trial.number}",
            tuple((report["step"], report[metric]) for report in trial.reports),
            faint=rank >= CURVES,
            dots=rank < CURVES,
        )
        for rank, trial in enumerate(valued)
    ]
    title = f"Learning curves ({metric}; the best {min(CURVES, len(valued))} in colour)"
    return line_chart(title, lines, _axis_format(metric), log=metric == "loss")


def _best_so_far(events: Sequence[Event], metric: str) -> Markup:
    """The best value so far, by the cost of the search until then."""
    pick = min if metric == "loss" else max
    best: float | None = None
    seconds: dict[int, float] = {}
    minutes, points = 0.0, list[Point]()

    for event in events:
        if event["event"] != "report":
            continue
        best = event[metric] if best is None else pick(best, event[metric])

        fresh = event["seconds"] - seconds.get(event["number"], 0.0)
        seconds[event["number"]] = event["seconds"]
        minutes += fresh * event.get("workers", 1) / 60
        points.append((minutes, best))

    return line_chart(
        f"Best {metric} so far",
        [Series("best", tuple(points))],
        _axis_format(metric),
        x_label="worker minutes of training",
    )


def _cost_of_each(trials: Sequence[TrialRecord]) -> Markup:
    spent = tuple((float(t.number), t.worker_minutes) for t in trials if t.reports)
    return line_chart(
        "Cost of each trial, worker minutes",
        [Series("cost", spent, dots=True, joined=False)],
        y_limits=(0.0, None),
        x_label="trial",
    )


def _row(trial: TrialRecord, metric: str, mark: str = "") -> TrialRow:
    memory = trial.cost("memory")
    notes = ", ".join(
        f"{key.rsplit('.', 1)[-1]} {f'{value:.4g}' if isinstance(value, float) else json.dumps(value)}"
        for key, value in trial.settings.items()
    )
    notes += "".join(f"; took over {exploit['origin']}" for exploit in trial.exploits)
    notes += f"; {trial.reason}" if trial.reason else ""

    return TrialRow(
        f"{trial.number}{mark}",
        trial.status,
        _shown(trial.value(metric), metric),
        f"{trial.steps:,}",
        duration(trial.seconds),
        size(memory * 2**30) if memory else "",
        notes,
    )


def _axis_format(metric: str) -> Callable[[float], str]:
    return "{:.0%}".format if metric == "accuracy" else "{:.3g}".format


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return percent(value) if metric == "accuracy" else f"{value:.4g}"
