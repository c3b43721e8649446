"""Evaluation of the validation shards: answers, searches, preferences and the loss.

In: a model, a run's config and Folders. Out: an EvalReport, the same on every worker. Each worker takes every
world_size-th micro-batch; all functions on models are collective over the process group.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import nn

from smolray.config import RunConfig
from smolray.data.encode import cached_encoder
from smolray.data.plan import EpochPlan, PlanLimits, build_epoch
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.data.stream import Stream
from smolray.evaluate.evaluator import EvalReport, evaluate
from smolray.evaluate.fit import most_tokens
from smolray.evaluate.loss import mean_loss
from smolray.evaluate.measure import goodness
from smolray.evaluate.preference import margins, preference
from smolray.evaluate.retrieval import search_report


def evaluate_shards(model: nn.Module, config: RunConfig, folders: Folders, device: torch.device) -> EvalReport:
    """Greedy decoding of the validation questions, or a search among the validation images. Collective."""
    settings = config.evaluate
    index = load_index(folders.validation, config)
    rows = _first_samples(index.filter(pc.greater(index["tokens"], 0)), config)
    group = min(config.data.max_questions_per_image, settings.batch_size) if config.data.packing != "none" else 1
    fits = most_tokens(model, device)
    plan = build_epoch(rows, PlanLimits(settings.batch_size, fits, group), 0, 0, shuffle=False)

    search = config.traits.evaluation == "search"
    collate = config.traits.collate if search else "prompts"
    stream = _own_batches(plan, config, folders, collate)
    encoder = cached_encoder(config.model, config.data, config.image)

    training = model.training
    model.eval()
    if search:
        report = search_report(model, stream, device)
    else:
        report = evaluate(model, stream, encoder, settings.max_new_tokens, device, settings.metrics)
    if config.traits.pairs:
        report = with_preference(report, model, config, folders, rows, device)
    model.train(training)

    return replace(report, left_out=int((index["tokens"].to_numpy() == 0).sum()))


def evaluation_fields(report: EvalReport) -> dict[str, Any]:
    """What result.json says of an evaluation."""
    return {
        "accuracy": report.accuracy,
        "accuracy_counts": report.counts,
        "metrics": report.metrics,
        "skipped": report.skipped,
        "left_out": report.left_out,
    }


def headline(report: EvalReport, config: RunConfig) -> float:
    """What the best checkpoint is chosen by.

    The method's own metric, else the first of evaluate.metrics that could be computed.
    """
    names = (config.traits.headline, *config.evaluate.metrics)
    return next(
        (goodness(name, report.metrics[name]["overall"]["value"]) for name in names if name in report.metrics),
        report.accuracy["overall"],
    )


def with_preference(
    report: EvalReport, model: nn.Module, config: RunConfig, folders: Folders, rows: pa.Table, device: torch.device
) -> EvalReport:
    """The report with the preference accuracy of the pairs among the index rows. Collective."""
    pairs = rows.filter(pc.greater(rows["chosen_tokens"], 0))
    if not len(pairs):
        return report

    plan = build_epoch(pairs, PlanLimits.of(config), 0, 0, shuffle=False)
    stream = _own_batches(plan, config, folders)
    margin_of = margins(model, stream, device, config.traits.length_normalised)
    found = preference(margin_of, report.predictions)
    accuracy, counts = {"preference": found["overall"]["value"]}, {"preference": found["overall"]["samples"]}
    return replace(
        report,
        accuracy=report.accuracy | accuracy,
        counts=report.counts | counts,
        metrics=report.metrics | {"preference": found},
    )


def validation_loss(model: nn.Module, config: RunConfig, folders: Folders, device: torch.device) -> float:
    """Mean loss over the trained tokens of the validation shards. Collective."""
    index = load_index(folders.validation, config)
    trained = index.filter(pc.and_(pc.greater(index["tokens"], 0), pc.greater(index["label_tokens"], 0)))
    plan = build_epoch(_first_samples(trained, config), PlanLimits.of(config), 0, 0, shuffle=False)
    stream = _own_batches(plan, config, folders)
    return mean_loss(model, stream, int(plan.label_tokens.sum()), device)


def _first_samples(rows: pa.Table, config: RunConfig) -> pa.Table:
    """The index rows that evaluate.max_samples leaves."""
    return rows if config.evaluate.max_samples is None else rows.slice(0, config.evaluate.max_samples)


def _own_batches(plan: EpochPlan, config: RunConfig, folders: Folders, collate: str | None = None) -> Stream:
    """The micro-batches of this worker; without `collate` as in training."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return Stream(
        folders.validation,
        plan,
        range(len(plan))[rank::world],
        config,
        collate=collate,
        consumers=world,
        sidecars=folders.validation_sidecars,
    )
