"""Preference data from a trained model's own mistakes: `python jobs/hard_negatives.py RUN OUT [--storage runs]`.

In: a run and its questions. Out: OUT/train and OUT/validation, shards of preference data. The right answer is chosen;
the wrong answer of the same type that the model finds most probable is rejected, as DPO learns most from it.

Next: `smolray train method=dpo data.train=OUT/train data.validation=OUT/validation model.path=RUN/export …`
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from smolray import storage
from smolray.config import load_config
from smolray.data.collate import Group, collate_training, question_record
from smolray.data.encode import Encoder, cached_encoder
from smolray.data.reader import ShardReader
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.data.shards import write_shards
from smolray.model.forward import target_states
from smolray.model.load import base_model
from smolray.model.trained import trained_model
from smolray.objectives.base import completion_logps
from smolray.run.checkpoint import chosen_checkpoint
from smolray.run.folder import RunFolder

MOST_ANSWERS = 32  # of a type: the most common ones
ROWS_AT_ONCE = 8


def shard_rows(folder: str, limit: int | None = None) -> list[ShardRow]:
    """The rows of a shard folder, at most `limit`."""
    return list(islice(ShardReader.open(folder).rows(), limit))


def answers_by_type(rows: Sequence[ShardRow]) -> dict[str, list[str]]:
    """The most common answers of each question type. Wrong answers are taken from them."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for conversation in row.conversations:
            found[conversation.type][question_record(conversation)["answer"]] += 1
    return {kind: [answer for answer, _ in counts.most_common(MOST_ANSWERS)] for kind, counts in found.items()}


@torch.no_grad()
def hard_negatives(
    model: nn.Module,
    rows: Sequence[ShardRow],
    answers: Mapping[str, Sequence[str]],
    encoder: Encoder,
    device: torch.device,
) -> Iterator[ShardRow]:
    """The rows as preference data.

    All answers of a question's type are branches of one packed prompt, so each image is encoded once.
    """
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        candidates = [
            replace(row, conversations=tuple(_answered(c, a) for c in row.conversations for a in answers[c.type]))
            for row in part
        ]
        batch = collate_training([Group(row, tuple(range(len(row.conversations)))) for row in candidates], encoder).to(
            device
        )
        logps = iter(completion_logps(base_model(model).lm_head, target_states(model, batch), batch).tolist())
        for row in part:
            pairs = [_pair(c, dict(zip(answers[c.type], logps, strict=False))) for c in row.conversations]
            if kept := tuple(pair for pair in pairs if pair is not None):
                yield replace(row, conversations=kept)


def _answered(conversation: Conversation, answer: str) -> Conversation:
    return replace(conversation, messages=(*conversation.messages[:-1], _turn(answer)))


def _pair(conversation: Conversation, logps: dict[str, float]) -> Conversation | None:
    right = {answer.strip().casefold() for answer in question_record(conversation)["answers"]}
    wrong = {answer: logp for answer, logp in logps.items() if answer.strip().casefold() not in right}
    if not wrong:  # all answers of the type are right
        return None
    *prompt, answer = conversation.messages
    hardest = max(wrong, key=wrong.__getitem__)
    return replace(conversation, messages=tuple(prompt), chosen=(answer,), rejected=(_turn(hardest),))


def _turn(answer: str) -> Message:
    return Message("assistant", (Part("text", answer),))


def main() -> None:
    """Mine the training and the validation shards of a run, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="name of a run that has trained on questions with short answers")
    parser.add_argument("out", help="folder or URI for the two shard folders")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--checkpoint", help="default: the best, else the newest")
    parser.add_argument("--limit", type=int, help="images of each part")
    options = parser.parse_args()

    run_dir = storage.join(options.storage, options.run)
    config = load_config(RunFolder(run_dir).config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained_model(config, chosen_checkpoint(run_dir, options.checkpoint)).to(device)
    # All answers of all questions about an image are one sequence.
    data = config.data.replace({"packing": "full", "max_length": 10**6})
    encoder = cached_encoder(config.model, data, config.image)

    answers = answers_by_type(shard_rows(config.data.train_folder))
    for part in ("train", "validation"):
        if folder := getattr(config.data, part):
            rows = list(hard_negatives(model, shard_rows(folder, options.limit), answers, encoder, device))
            target = write_shards(storage.join(options.out, part), rows)
            pairs = sum(len(row.conversations) for row in rows)
            print(f"{part}: {pairs:,} pairs about {len(rows):,} images in {target}")


if __name__ == "__main__":
    main()
