"""The console output of a running search: a live table in a terminal, else a line for each report.

In: the log of the search. Out: text.
"""

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from smolray.config import RunConfig
from smolray.run.folder import RunFolder
from smolray.run.progress import duration
from smolray.tune.log import TrialLog, TrialRecord, best_trial
from smolray.tune.report import write_report
from smolray.tune.space import Space, longest

COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}


class SearchDisplay:
    """Shows the trials of the log, and keeps the HTML report up to date."""

    def __init__(self, trial_log: TrialLog, config: RunConfig, space: Space, total: int):
        self.trial_log, self.config, self.space, self.total = trial_log, config, space, total
        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.printed: dict[int, tuple[str, str, int]] = {t.number: _state(t) for t in trial_log.trials.values()}

    def __enter__(self) -> "SearchDisplay":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        """Refresh the table, or print what is new as lines."""
        if self.live:
            table = trials_table(self.trial_log.in_order(), self.config, self.space, self.total)
            self.live.update(table, refresh=True)
            return
        for trial in self.trial_log.in_order():
            if self.printed.get(trial.number) != _state(trial):
                self.printed[trial.number] = _state(trial)
                print(trial_line(trial, self.config), flush=True)

    def write_report(self) -> None:
        """Write the HTML report of the log as it is now."""
        write_report(self.trial_log.folder, self.config, self.space)


def trials_table(trials: list[TrialRecord], config: RunConfig, space: Space, total: int) -> Table:
    """A row for each trial, the best one in green."""
    assert config.search is not None
    metric = config.search.metric
    best = best_trial(trials, metric)
    ended = sum(trial.ended for trial in trials)
    table = Table(
        box=None,
        pad_edge=False,
        header_style="dim",
        title=f"{config.name}: {ended} of {total} trials ended",
        title_justify="left",
    )
    for column in ("trial", "state", "reports", "step", metric, "training"):
        table.add_column(column, justify="left" if column == "state" else "right")
    table.add_column("settings", overflow="fold")

    for trial in trials:
        value = trial.value(metric)
        shown = "-" if value is None else f"{value:.4f}"
        colour = COLOURS[trial.status]
        table.add_row(
            str(trial.number),
            f"[{colour}]{trial.status}[/]",
            f"{trial.reports[-1]['report'] if trial.reports else 0}/{longest(config, space)}",
            str(trial.steps),
            f"[bold green]{shown}[/]" if trial is best else shown,
            duration(trial.seconds),
            escape(trial.reason or settings_line(trial.settings)),
        )
    return table


def trial_line(trial: TrialRecord, config: RunConfig) -> str:
    """As in `trial 3  running  step 120  accuracy 0.8123  learning_rate=0.0003`."""
    assert config.search is not None
    parts = [f"trial {trial.number}", trial.status]
    if trial.reports:
        last = trial.reports[-1]
        parts += [f"step {last['step']}", f"{config.search.metric} {last[config.search.metric]:.4f}"]
    return "  ".join([*parts, trial.reason or settings_line(trial.settings)])


def settings_line(settings: dict[str, Any]) -> str:
    """As in `learning_rate=0.0003 r=8`."""
    return " ".join(
        f"{key.rsplit('.', 1)[-1]}={f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in settings.items()
    )


def _state(trial: TrialRecord) -> tuple[str, str, int]:
    """The state of a trial: when it changes, a new line is printed."""
    return trial.status, trial.run, len(trial.reports)


def result_lines(result: dict[str, Any], folder: str) -> list[str]:
    """The end of a session in words, from its result.json."""
    minutes = f"{result['worker_minutes']:.1f} worker minutes of training"
    lines = [f"{result['trials']} trials, {result['steps']:,} steps, {minutes}"]
    if result["left"]:
        lines.append(f"interrupted: {result['left']} trials have not ended; re-run with the same name to resume them")
    lines += [f"trial {number} failed: {reason}" for number, reason in result["failed"].items()]
    if best := result.get("best"):
        value = f"{result['metric']} {best[result['metric']]:.4f}"
        lines.append(f"best: trial {best['number']} (run {best['run']}), {value}, {settings_line(best['settings'])}")
        lines.append(f"train with it: smolray train --config {best['config']}")
    return [*lines, f"report: {RunFolder(folder).report}"]
