"""A trained model's answers with the tiles of a stock call beside those of training, on a few validation questions.

In: a model, its run and the image settings of a stock call. Out: StockAnswers: a metric of the same questions twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import nn

from smolray.config import ImageConfig, RunConfig
from smolray.data.collate import Group, collate_prompts
from smolray.data.encode import Encoder, cached_encoder
from smolray.data.reader import ShardReader
from smolray.data.tiles import image_size
from smolray.evaluate.evaluator import summarize, to_prediction
from smolray.model.decoding import greedy, stop_ids_of
from smolray.run.predictions import Prediction

QUESTIONS = 32
TOGETHER = 4  # questions decoded at a time: an image may have 17 tiles


@dataclass(frozen=True)
class StockAnswers:
    """What a stock call changes.

    Attributes:
        metric: the first of evaluate.metrics.
        questions: validation questions that were answered both ways.
        other_tiles: those of them whose images a stock call cuts otherwise.
        as_trained: the metric with the tiles of training.
        stock: the metric with the tiles of a stock call.
    """

    metric: str
    questions: int
    other_tiles: int
    as_trained: float
    stock: float


def stock_answers(model: nn.Module, config: RunConfig, stock: ImageConfig) -> StockAnswers | None:
    """Answer the first validation questions with the run's tiles and with those of `stock`.

    Returns:
        None where there is nothing to compare: the run's method has no answers, no question fits into data.max_length,
        or the metric does not apply.
    """
    if config.traits.evaluation != "answers":
        return None

    ours = cached_encoder(config.model, config.data, config.image)
    theirs = cached_encoder(config.model, config.data, stock)
    groups = list(islice(_questions(config.data.validation, ours), QUESTIONS))
    differ = [n for n, group in enumerate(groups) if _other_tiles(group, ours, theirs)]

    model.eval()
    limit = config.evaluate.max_new_tokens
    trained = _answers(model, groups, ours, limit)
    again = _answers(model, [groups[n] for n in differ], theirs, limit)
    changed = dict(zip(differ, again, strict=True))
    answered = [changed.get(n, prediction) for n, prediction in enumerate(trained)]

    metric = config.evaluate.metrics[0]
    reports = [summarize(predictions, (metric,)) for predictions in (trained, answered)]
    if any(metric not in report.metrics for report in reports):
        return None
    as_trained, with_stock = (float(report.metrics[metric]["overall"]["value"]) for report in reports)
    return StockAnswers(metric, len(groups), len(differ), as_trained, with_stock)


def _questions(folder: str, encoder: Encoder) -> Iterator[Group]:
    """Each question that the run's own evaluation answers, alone."""
    for row in ShardReader.open(folder).rows():
        grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
        for number, conversation in enumerate(row.conversations):
            if encoder.branches(conversation, grids) is not None:
                yield Group(row, (number,))


def _other_tiles(group: Group, ours: Encoder, theirs: Encoder) -> bool:
    sizes = [image_size(image) for image in group.row.images]
    return any(
        (ours.tiler.target(*size), ours.tiler.grid(*size)) != (theirs.tiler.target(*size), theirs.tiler.grid(*size))
        for size in sizes
    )


def _answers(model: nn.Module, groups: list[Group], encoder: Encoder, max_new_tokens: int) -> list[Prediction]:
    """The prediction of each group's question, decoded greedily on the model's device."""
    device, stop_ids = next(model.parameters()).device, stop_ids_of(model, encoder)
    found: list[Prediction] = []
    for start in range(0, len(groups), TOGETHER):
        batch = collate_prompts(groups[start : start + TOGETHER], encoder)
        ids = greedy(model, batch.to(device), max_new_tokens, stop_ids)
        texts = encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found += [to_prediction(record, text) for record, text in zip(batch.meta["records"], texts, strict=True)]
    return found
