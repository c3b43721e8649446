"""Write the easy-vqa data set (PyPI `easy-vqa`) as Parquet in the Hugging Face layout: a small real data set for demos and tests.

`python jobs/easyvqa.py OUT` writes OUT/train.parquet (38,575 questions, 4,000 images) and OUT/test.parquet (9,673 questions).
"""

import sys
from pathlib import Path

import easy_vqa
import pyarrow as pa
import pyarrow.parquet as pq

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


def question_type(answer: str) -> str:
    """yes/no, shape or color."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def export_easy_vqa(folder: str | Path, limit: int | None = None) -> dict[str, Path]:
    """Write `train.parquet` and `test.parquet` under `folder`, at most `limit` questions each, and return their paths by split."""
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    for split, path in export_easy_vqa(sys.argv[1]).items():
        print(f"{split}: {path} ({pq.read_metadata(path).num_rows} questions)")
