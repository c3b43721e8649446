"""The `search` section of a run: what is searched, how, and what counts as good."""

from typing import Any, Literal

from pydantic import Field

from smolray.config_section import Section


class SearchConfig(Section):
    space: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="dotted key of the run -> {loguniform | uniform | int: [low, high]} or {choice | grid: [values]}; default: the published recipe's ranges",
    )
    num_samples: int = Field(default=12, ge=1, description="trials; with grid keys: times each combination")
    algorithm: Literal["random", "grid", "optuna"] = Field(default="optuna", description="grid: every combination of choice and grid keys")
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = Field(
        default="asha", description="asha: stop the worse early; hyperband: asha with several first rungs; pbt: the worse take over the weights of the better"
    )
    metric: Literal["accuracy", "loss"] = Field(
        default="accuracy", description="at the checkpoints. accuracy: what the best checkpoint of a run is chosen by; "
        "loss: of the validation answers, without data.validation (and for dpo) of the training steps since the checkpoint before"
    )  # fmt: skip
    second_objective: Literal["memory", "seconds"] | None = Field(default=None, description="optuna: accuracy or loss against peak memory or training time")
    grace_period: int = Field(default=1, ge=1, description="reports (epochs, unless evaluate.eval_epochs says otherwise) before a trial may be stopped")
    reduction_factor: float = Field(default=3.0, gt=1, description="asha, hyperband: one of so many goes on from each rung")
    perturbation_interval: int = Field(default=1, ge=1, description="pbt: reports between two looks at who is better")
    max_concurrent: int | None = Field(default=None, ge=1, description="trials at a time; default: as many as the cluster holds")
    train_best: bool = Field(default=False, description="train with best.yaml when the search is over")
