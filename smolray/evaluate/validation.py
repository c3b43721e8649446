"""What a worker evaluates: answers, searches, preferences and losses over the validation shards, each worker every
so-manieth micro-batch.

In: a model, a run's config and Folders. Out: an EvalReport, the same on every worker. Collective over the process
group.
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
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.ray_jobs import load_index
from smolray.data.reader import Folders
from smolray.data.stream import Stream
from smolray.evaluate.evaluator import EvalReport, evaluate
from smolray.evaluate.loss import mean_loss
from smolray.evaluate.measure import goodness
from smolray.evaluate.preference import margins, preference
from smolray.evaluate.retrieval import search_report


def evaluate_shards(model: nn.Module, config: RunConfig, folders: Folders, device: torch.device) -> EvalReport:
    """Greedy decoding of the validation shards (method: retrieval: a search in them), each worker every so-manieth
    micro-batch. Collective.
    """
    settings, folder, sidecars = config.evaluate, folders.validation, folders.validation_sidecars
    group = min(config.data.max_questions_per_image, settings.batch_size) if config.data.packing != "none" else 1
    index = load_index(folder, config)
    asked = index.filter(pc.greater(index["tokens"], 0))
    if settings.max_samples is not None:
        asked = asked.slice(0, settings.max_samples)
    plan = build_epoch(asked, PlanLimits(settings.batch_size, None, group), 0, 0, shuffle=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    collate = "retrieval" if config.method == "retrieval" else "prompts"
    stream = Stream(
        folder, plan, range(len(plan))[rank::world], config, collate=collate, consumers=world, sidecars=sidecars
    )
    tokenizer = cached_encoder(config.model, config.data, config.image).tokenizer
    training = model.training
    model.eval()
    if config.method == "retrieval":
        report = search_report(model, stream, device)
    else:
        report = evaluate(model, stream, tokenizer, settings.max_new_tokens, device, settings.metrics)
    if config.method == "dpo":
        report = with_preference(report, model, config, folders, asked, device)
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
    """What the best checkpoint is chosen by: the preference accuracy of DPO, the precision of a search, else the first
    of evaluate.metrics that could be taken.
    """
    names = ("preference", "mean_average_precision", *config.evaluate.metrics)
    return next(
        (goodness(name, report.metrics[name]["overall"]["value"]) for name in names if name in report.metrics),
        report.accuracy["overall"],
    )


def with_preference(
    report: EvalReport, model: nn.Module, config: RunConfig, folders: Folders, asked: pa.Table, device: torch.device
) -> EvalReport:
    """The report with the preference accuracy of the pairs among the lines `asked`. Collective."""
    pairs = asked.filter(pc.greater(asked["chosen_tokens"], 0))
    if not len(pairs):
        return report
    plan = build_epoch(pairs, PlanLimits.of(config), 0, 0, shuffle=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    stream = Stream(
        folders.validation,
        plan,
        range(len(plan))[rank::world],
        config,
        consumers=world,
        sidecars=folders.validation_sidecars,
    )
    found = preference(margins(model, stream, device), report.predictions)
    accuracy, counts = {"preference": found["overall"]["value"]}, {"preference": found["overall"]["samples"]}
    return replace(
        report,
        accuracy=report.accuracy | accuracy,
        counts=report.counts | counts,
        metrics=report.metrics | {"preference": found},
    )


def validation_loss(model: nn.Module, config: RunConfig, folders: Folders, device: torch.device) -> float:
    """Mean over the trained tokens of the validation shards. Collective."""
    index = load_index(folders.validation, config)
    asked = index.filter(pc.and_(pc.greater(index["tokens"], 0), pc.greater(index["label_tokens"], 0)))
    if config.evaluate.max_samples is not None:
        asked = asked.slice(0, config.evaluate.max_samples)
    plan = build_epoch(asked, PlanLimits.of(config), 0, 0, shuffle=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    stream = Stream(
        folders.validation,
        plan,
        range(len(plan))[rank::world],
        config,
        consumers=world,
        sidecars=folders.validation_sidecars,
    )
    return mean_loss(model, stream, int(plan.label_tokens.sum()), device)
