"""Write the easy-vqa data set (PyPI `easy-vqa`) as Parquet files: a small real data set for demos and tests.

`python jobs/easyvqa.py OUT` writes OUT/train.parquet (38,575 questions, 4,000 images) and OUT/test.parquet (9,673
questions), in the layout of Hugging Face `datasets`.
"""

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import easy_vqa
import pyarrow as pa
import pyarrow.parquet as pq

from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key

SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("question", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("question_type", pa.string()),
        pa.field("image_id", pa.int64()),
        pa.field("question_id", pa.string()),
    ]
)
ROW_GROUP_ROWS = 1000
ANSWERS = {
    "yes/no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow"),
}


def question_type(answer: str) -> str:
    """yes/no, shape or color."""
    return next((name for name, answers in ANSWERS.items() if answer in answers), "color")


def vqa_rows(split: str, images: int) -> list[ShardRow]:
    """The first `images` images of easy-vqa's split with all their questions."""
    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    by_image: dict[int, list[Conversation]] = defaultdict(list)
    for i, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        turns = (
            Message("user", (Part("image"), Part("text", question))),
            Message("assistant", (Part("text", answer),)),
        )
        by_image[image].append(Conversation(f"{split}-{i}", turns, type=question_type(answer), answers=(answer,)))
    rows = []
    for image in sorted(by_image)[:images]:
        encoded = (Path(paths[image]).read_bytes(),)
        rows.append(ShardRow(image_key(encoded, by_image[image][0]), encoded, tuple(by_image[image])))
    random.Random(0).shuffle(rows)
    return rows


def preference_rows(split: str, images: int) -> list[ShardRow]:
    """The same as preference data: rejected is a wrong answer of the same type, every third time in more words than the
    right one.
    """
    rng = random.Random(1)
    return [
        ShardRow(row.key, row.images, tuple(_preference(c, rng) for c in row.conversations))
        for row in vqa_rows(split, images)
    ]


def _preference(conversation: Conversation, rng: random.Random) -> Conversation:
    question, right = conversation.messages
    wrong = rng.choice([a for a in ANSWERS[conversation.type] if a != right.text])
    wrong = f"it is {wrong} in the image" if rng.random() < 1 / 3 else wrong
    return replace(
        conversation, messages=(question,), chosen=(right,), rejected=(Message("assistant", (Part("text", wrong),)),)
    )


def export_easy_vqa(folder: str | Path, limit: int | None = None) -> dict[str, Path]:
    """Write `train.parquet` and `test.parquet` under `folder`, at most `limit` questions each, and return their paths
    by split.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    written = {}
    for split, (questions, image_paths) in splits.items():
        rows = [
            {
                "image": {"bytes": Path(image_paths[image_id]).read_bytes(), "path": f"{image_id}.png"},
                "question": question,
                "answer": answer,
                "question_type": question_type(answer),
                "image_id": image_id,
                "question_id": f"{split}-{number}",
            }
            for number, (question, answer, image_id) in enumerate(zip(*questions, strict=True))
            if limit is None or number < limit
        ]
        written[split] = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), written[split], row_group_size=ROW_GROUP_ROWS)
    return written


def main() -> None:
    """Write the two files and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--limit", type=int, help="most questions in each file; default: all")
    options = parser.parse_args()

    for split, path in export_easy_vqa(options.out, options.limit).items():
        print(f"{split}: {path} ({pq.read_metadata(path).num_rows:,} questions)")


if __name__ == "__main__":
    main()
