"""The columns of a raw record: which names are known, and what each column was used as.

In: a record as its file had it. Out: a Row, from which the layouts take the columns that they use.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.values import is_missing, shown
from smolray.data.sample import SampleError

RawRecord = Mapping[str, Any]

MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
QUESTION_COLUMNS = ("question", "query", "instruction", "prompt", "input")
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers", "response", "output", "direct_answers", "label")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
MORE_CAPTION_COLUMNS = ("sentences", "sentence", "descriptions", "description", "alt_text")
LABEL_COLUMNS = ("label", "cls")
ID_COLUMNS = ("question_id", "questionId", "id")
TYPE_COLUMNS = ("answer_type", "question_type", "question_types", "type")


class Row:
    """A record as the layouts read it, without data.ignore_columns. Nulls and NaN count as missing.

    `used`: what each column that was taken was used as.
    """

    def __init__(self, record: RawRecord, data: DataConfig):
        ignored = set(data.ignore_columns)
        self.record = {name: value for name, value in record.items() if name not in ignored}
        self.data = data
        self.used: dict[str, str] = {}
        self._names = {name.lower(): name for name in reversed(self.record)}

    def find(self, names: Iterable[str]) -> str:
        """The column of the first of `names`, in any case, that holds a value; empty where none does."""
        for name in names:
            column = name if name in self.record else self._names.get(name.lower(), "")
            if column and not is_missing(self.record[column]):
                return column
        return ""

    def has(self, *names: str) -> bool:
        """Whether a column of each of `names`, in any case, holds a value."""
        return all(self.find((name,)) for name in names)

    def add(self, columns: RawRecord) -> None:
        """Add the columns that the record does not have."""
        self.record = {**columns, **self.record}
        self._names = {name.lower(): name for name in reversed(self.record)}

    def lacks(self, names: Iterable[str]) -> bool:
        """Whether there is no column of any of `names`, in any case, not even an empty one."""
        return not any(name in self.record or name.lower() in self._names for name in names)

    def use(self, column: str, purpose: str) -> Any:
        """The value of a column, which is from now on used as `purpose`."""
        self.used[column] = purpose
        return self.record[column]

    def check_named(self, keys: Collection[str] | None = None) -> None:
        """Raise SampleError where a column that data.columns names is missing. `keys`: those to check; default: all."""
        for key, named in self.data.columns.model_dump(include=None if keys is None else set(keys)).items():
            for column in (named,) if isinstance(named, str) else named:
                if column and column not in self.record:
                    message = f"column {column!r} (data.columns.{key}) is not there; {self.columns_found()}"
                    raise SampleError("wrong_columns", message)

    def columns_found(self) -> str:
        """The columns of the record, for a message."""
        names = (f"{name} (empty)" if is_missing(value) else str(name) for name, value in self.record.items())
        return f"columns found: {', '.join(names) or 'none'}"


def question_column(row: Row) -> str:
    """The column with the question, empty where there is none."""
    return row.find((row.data.columns.question,) if row.data.columns.question else QUESTION_COLUMNS)


def own_id(row: Row) -> str:
    """The row's own id, empty where it has none. Raises SampleError where data.columns.id holds none."""
    named = row.data.columns.id
    for column in filter(None, (row.find((name,)) for name in ([named] if named else ID_COLUMNS))):
        value = row.record[column]
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(row.use(column, "id"))
    if named:
        value = shown(row.record.get(named))
        raise SampleError("wrong_type", f"the id in column {named!r} is {value}; expected a string or an integer")
    return ""


def id_if_any(record: RawRecord, data: DataConfig) -> str:
    """The own id of a record that may be bad in every way; empty where it has none."""
    try:
        return own_id(Row(record, data))
    except SampleError:
        return ""


def type_of(row: Row) -> str:
    """The type of the question, for tables by type; empty where the record names none."""
    named = row.data.columns.type
    for column in filter(None, (row.find((name,)) for name in ([named] if named else TYPE_COLUMNS))):
        value = row.record[column]
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return ", ".join(row.use(column, "type"))
        if isinstance(value, (str, int)):
            return str(row.use(column, "type"))
    return ""
