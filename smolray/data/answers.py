"""Which answers the training data gives to which questions, counted shard by shard."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.data.collate import question_record
from smolray.data.shards import decode_rows

TEXT_SHARDS = 8  # enough for the tokenizer of an offline model
ANSWERS_SCHEMA = pa.schema([("question", pa.string()), ("answer", pa.string()), ("count", pa.int64())])


def count_answers(folder: str, name: str, number: int) -> pa.Table:
    """How often each (question, answer) stands in one shard (ANSWERS_SCHEMA); images are not read."""
    fs, path = storage.filesystem(storage.join(folder, name))
    counts: Counter[tuple[str, str]] = Counter()
    table = pq.read_table(path, filesystem=fs, columns=["key", "conversations"])
    for row in decode_rows(table.append_column("images", pa.array([[]] * len(table), pa.list_(pa.binary())))):
        for conversation in row.conversations:
            record = question_record(conversation)
            counts[record["question"], record["answer"]] += 1
    return pa.Table.from_pylist(
        [{"question": q, "answer": a, "count": n} for (q, a), n in counts.items()], schema=ANSWERS_SCHEMA
    )


def distinct_texts(tables: Iterable[pa.Table]) -> list[str]:
    """Every question with its answer once, sorted: what the tokenizer of an offline model is trained on."""
    return [
        f"{q}\n {a}"
        for q, a in sorted({(line["question"], line["answer"]) for table in tables for line in table.to_pylist()})
    ]
