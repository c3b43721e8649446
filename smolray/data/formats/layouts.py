"""One raw record of any known layout -> Samples.

The layouts: VQA, lists of questions, multiple choice, captions, labels, LLaVA, The Cauldron, TRL's conversational and
preference formats, Alpaca, ms-swift and LLaMA-Factory.

In: a dict of column values, from any data format, and a name for the row. Out: a checked Sample for each conversation,
and what each column was used as.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from smolray.config import DataConfig
from smolray.data.formats.answers import answers_of
from smolray.data.formats.columns import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    MESSAGE_COLUMNS,
    MORE_CAPTION_COLUMNS,
    QUESTION_COLUMNS,
    RawRecord,
    Row,
    own_id,
    question_column,
    type_of,
)
from smolray.data.formats.image_columns import IMAGE_COLUMNS, has_image, image_values
from smolray.data.formats.images import ImageReader
from smolray.data.formats.markers import place_images
from smolray.data.formats.options import KEY_COLUMNS, chosen_option, key_column, take_options
from smolray.data.formats.preference import is_preference, parse_preference
from smolray.data.formats.question import earlier_turns, ending_messages, prompt_messages, question_text, with_system
from smolray.data.formats.turns import assistant_turn, check_text, read_messages, user_turn
from smolray.data.formats.unused import IMAGE_NAME, ParsedRow
from smolray.data.formats.values import is_missing, list_of, shown, text_of
from smolray.data.sample import Conversation, Message, Sample, SampleError, check_sample

EXPECTED = (
    "messages | conversations | texts | prompt + completion | [prompt +] chosen + rejected | question + answer(s) | "
    "an image + caption(s), text or label"
)
PAIRS_COLUMNS = ("qas", "qa", "qa_pairs", "question_answers", "question_answer_pairs")
PAIRED_COLUMNS = ("questions", "answers")
CAPTION_PROMPT = "Describe the image."
LABEL_PROMPT = "What is in the image?"

Parsed = tuple[list[Conversation], list[Any]]  # conversations without ids, image values found inside messages
Parser = Callable[[Row], Parsed]


def parse(record: RawRecord, row_id: str, data: DataConfig, images: ImageReader) -> ParsedRow:
    """The samples of one record, and what its columns were used as.

    Each of several captions becomes its own conversation.

    Ids: the row's own (`data.columns.id`, question_id, id) or `row_id`, followed by `/1`, `/2` … where a row has
    several conversations. `data.prompt` is put before a question (VQA, a string prompt) or is the whole question
    (captions, labels); messages have their own. Raises SampleError where the row cannot be trained on: a row keeps
    all of its conversations or none.
    """
    row = Row(record, data)
    row.check_named()
    own, kind = own_id(row) or row_id, type_of(row)
    conversations, embedded = _layout(row)(row)
    row_images = [images.read(value) for value in image_values(row, embedded)]

    samples = []
    for number, conversation in enumerate(conversations):
        name = own if len(conversations) == 1 else f"{own}/{number + 1}"
        conversation = replace(conversation, id=name, type=kind)
        sample = with_images(row, conversation, row_images)
        check_text(sample.conversation)
        check_sample(sample)
        samples.append(sample)
    return ParsedRow(samples, row.used)


def with_images(row: Row, conversation: Conversation, images: Sequence[bytes]) -> Sample:
    """A conversation of a row with its system turn and each image in its place. Raises SampleError."""
    # LLaVA's turns have a marker only where an image is; elsewhere the row must have a column for it.
    expected = not row.lacks(IMAGE_COLUMNS) or bool(row.data.columns.image) or row.has("conversations")
    placed = place_images(with_system(row, conversation.messages), len(images), expected)
    return Sample(tuple(images[n] for n in placed.order), replace(conversation, messages=placed.messages))


def _layout(row: Row) -> Parser:
    """The parser for this record's columns: by data.columns.answer where it is set, else the first that fits."""
    question, answer = question_column(row), row.find((*ANSWER_COLUMNS, *KEY_COLUMNS))
    if row.data.columns.answer:
        return _vqa if question else _caption
    if parser := conversation_parser(row):
        return parser

    if row.has("prompt", "completion") or (
        question and isinstance(row.record[question], list) and row.find(ANSWER_COLUMNS)
    ):
        return _prompt_completion
    if question and answer:
        return _vqa
    if (question or has_image(row)) and caption_column(row):
        return _caption
    raise _no_layout(row)


def _no_layout(row: Row) -> SampleError:
    """What is wrong with a row that no layout fits: its values are null, or its columns are others."""
    for names in (MESSAGE_COLUMNS, ("texts",)):
        if not row.lacks(names):
            return SampleError("no_turn", f"the row holds no conversation; {row.columns_found()}")
    asks = not row.lacks(QUESTION_COLUMNS) or bool(row.data.columns.question)
    if asks and not row.lacks((*ANSWER_COLUMNS, "completion")):
        if not row.find((*ANSWER_COLUMNS, "completion")):
            return SampleError("empty_answer", f"the row has no answer; {row.columns_found()}")
        return SampleError("empty_turn", f"the row has no question; {row.columns_found()}")
    if has_image(row) and not row.lacks((*CAPTION_COLUMNS, *LABEL_COLUMNS, *MORE_CAPTION_COLUMNS)):
        return SampleError("empty_answer", f"the row has no caption or label; {row.columns_found()}")
    return SampleError(
        "wrong_columns",
        f"no known layout; {row.columns_found()}; expected {EXPECTED}; or name them in data.columns.*",
    )


def conversation_parser(row: Row) -> Parser | None:
    """The parser for columns that hold whole conversations; None where there is no such column."""
    if is_preference(row):
        return parse_preference
    if row.find(MESSAGE_COLUMNS):
        return _messages
    if row.find(PAIRS_COLUMNS) or row.has(*PAIRED_COLUMNS):
        return _pairs
    return _cauldron if row.has("texts") else None


def caption_column(row: Row) -> str:
    """The column with captions or a label; empty where there is none."""
    return row.find((*CAPTION_COLUMNS, *LABEL_COLUMNS, *MORE_CAPTION_COLUMNS))


def _vqa(row: Row) -> Parsed:
    """A question with one or more answers, as in VQAv2, or with options.

    All annotators' answers are kept; the trained one is multiple_choice_answer, else the most common. With options, it
    is the right one of them.
    """
    options = take_options(row)
    question = user_turn(question_text(row, question_column(row), options))
    if options and (column := key_column(row)):
        trained = chosen_option(row.use(column, "answer"), options, row)
        answers: tuple[str, ...] = (trained,)
    else:
        trained, answers = _annotated(row)

    turns = (*earlier_turns(row), question, assistant_turn(trained))
    return [Conversation("", turns, answers=answers)], []


def _annotated(row: Row) -> tuple[str, tuple[str, ...]]:
    """The answer to train and all reference answers."""
    trained, answers = "", tuple[str, ...]()
    named = row.data.columns.answer
    columns = [named] if named else [c for c in (row.find((name,)) for name in ANSWER_COLUMNS) if c]
    if len(columns) > 1 and columns[-1] == "label":  # a class next to the answers is not an answer
        columns.pop()
    if not columns:
        column = row.find(KEY_COLUMNS)
        if not isinstance(row.record[column], str):
            raise SampleError("wrong_columns", f"{column!r} numbers an option, but no options; {row.columns_found()}")
        columns = [column]

    for column in columns:
        if is_missing(row.record[column]):
            continue
        values = answers_of(row.use(column, "answer"), column)
        trained = trained or (Counter(values).most_common(1)[0][0] if values else "")
        answers = values if len(values) > len(answers) else answers
    if not trained.strip():
        raise SampleError("empty_answer", "the answer is empty")
    return trained, answers or (trained,)


def _caption(row: Row) -> Parsed:
    """Captions or a label: a conversation for each, with the row's own question where it has one."""
    column = row.data.columns.answer or caption_column(row)
    labels = column.lower() in LABEL_COLUMNS
    value = row.use(column, "label" if labels else "caption")
    captions = () if is_missing(value) else answers_of(value, column)
    if not captions or not all(c.strip() for c in captions):
        raise SampleError(
            "empty_answer", f"{column!r} holds an empty caption" if captions else f"{column!r} holds no caption"
        )

    if own := question_column(row):
        before = (*earlier_turns(row), user_turn(question_text(row, own)))
    else:
        before = (user_turn(row.data.prompt or (LABEL_PROMPT if labels else CAPTION_PROMPT)),)
    return [Conversation("", (*before, assistant_turn(c)), answers=captions) for c in captions], []


def _pairs(row: Row) -> Parsed:
    """Several questions about the row's images, a conversation for each.

    They are a list of {question, answer(s)}, or a list of questions beside one of their answers.
    """
    if column := row.find(PAIRS_COLUMNS):
        pairs = list_of(row.use(column, "questions and answers"), column)
    else:
        column = " and ".join(PAIRED_COLUMNS)
        questions, answers = (list_of(row.use(row.find((name,)), name), name) for name in PAIRED_COLUMNS)
        if len(questions) != len(answers):
            raise SampleError("wrong_type", f"the row has {len(questions)} questions and {len(answers)} answers")
        pairs = [{"question": q, "answers": a} for q, a in zip(questions, answers, strict=True)]
    if not pairs:
        raise SampleError("no_turn", f"{column} holds no question; {row.columns_found()}")

    conversations = []
    for pair in pairs:
        own = Row(pair if isinstance(pair, Mapping) else {}, row.data)
        if not question_column(own) or own.lacks(ANSWER_COLUMNS):
            raise SampleError("wrong_type", f"{column} holds {shown(pair)}; expected {{question, answer}}")
        if not has_image(row) and (named := next(filter(IMAGE_NAME.fullmatch, map(str, own.record)), "")):
            raise SampleError("wrong_columns", f"the row has no image, and {column} names one in {named!r}")
        conversations += _vqa(own)[0]
    return conversations, []


def _messages(row: Row) -> Parsed:
    """Turns of any notation: TRL's and OpenAI's messages, LLaVA's conversations."""
    column = row.find(MESSAGE_COLUMNS)
    messages, embedded = read_messages(row.use(column, "messages"), column)
    return [Conversation("", messages)], embedded


def _cauldron(row: Row) -> Parsed:
    """The Cauldron: [{user, assistant}], turns of one conversation about the row's images."""
    messages: list[Message] = []
    for turn in list_of(row.use(row.find(("texts",)), "messages"), "texts"):
        if not isinstance(turn, Mapping) or "user" not in turn or "assistant" not in turn:
            raise SampleError("wrong_type", f"a turn of texts is {shown(turn)}; expected {{user, assistant}}")
        messages += [user_turn(text_of(turn["user"], "user")), assistant_turn(text_of(turn["assistant"], "assistant"))]
    return [Conversation("", tuple(messages))], []


def _prompt_completion(row: Row) -> Parsed:
    """A prompt and its completion, each a text or messages."""
    column = row.find(("prompt",)) or question_column(row)
    answer = row.find(("completion",)) or row.find(ANSWER_COLUMNS)
    value = row.use(column, "question")
    if isinstance(value, str):
        prompt, embedded = (*earlier_turns(row), user_turn(question_text(row, column))), list[Any]()
    else:
        prompt, embedded = prompt_messages(value, "prompt")
    completion, inside = ending_messages(row.use(answer, "answer"), answer)
    return [Conversation("", prompt + completion)], embedded + inside
