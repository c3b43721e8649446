"""The section `search`: what `smolray tune` searches for."""

from typing import Any, Literal

from pydantic import Field

from smolray.config.section import Section


class SearchConfig(Section):
    """Which hyperparameters `smolray tune` tries, and how it judges the trials. `smolray train` ignores it."""

    space: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """dotted key of the run -> {loguniform | uniform | int: [low, high]} or {choice | grid: [values]}; default: the
    ranges of the published recipe"""
    num_samples: int = Field(default=12, ge=1)
    """trials; with grid keys: repeats of each combination"""
    algorithm: Literal["random", "grid", "optuna"] = "optuna"
    """grid: every combination of choice and grid keys"""
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = "asha"
    """asha: stop the worse trials early; hyperband: asha with several first rungs; pbt: the worse trials copy the
    weights of the better ones"""
    metric: Literal["accuracy", "loss"] = "accuracy"
    """accuracy: the figure that also chooses the best checkpoint of a run; loss: of the validation answers (sft
    with data.validation), else of the training steps since the last checkpoint"""
    second_objective: Literal["memory", "seconds"] | None = None
    """optuna: optimise peak memory or training time as well"""
    grace_period: int = Field(default=1, ge=1)
    """reports before a trial may be stopped (a report is an epoch, unless evaluate.eval_epochs differs)"""
    reduction_factor: float = Field(default=3.0, gt=1)
    """asha, hyperband: one in this many trials continues from each rung"""
    perturbation_interval: int = Field(default=1, ge=1)
    """pbt: reports between two comparisons of the trials"""
    max_concurrent: int | None = Field(default=None, ge=1)
    """trials at a time; default: as many as fit on the cluster"""
    train_best: bool = False
    """train a run with best.yaml when the search is over"""
