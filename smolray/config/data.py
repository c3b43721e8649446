"""Settings of the data: where they are, how rows are read, and how conversations become sequences of tokens."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from smolray.config.section import Section

AUTO_LENGTHS = (2048, 8192)  # of data.max_length=auto: the shortest and the longest
OptionAnswer = Literal["letter", "letter_text", "text"]
Augmentation = Literal["flip", "crop", "rotate", "color", "gray", "blur", "jpeg"]
AnswerKey = Literal["auto", "letter", "text", "index", "index_from_1"]


class ColumnsConfig(Section):
    """Column names of the source. An empty name means that the usual names are recognised."""

    image: str | tuple[str, ...] = ""
    """column with the image or images; a list of columns: their images in this order"""
    question: str = ""
    """column with the question"""
    answer: str = ""
    """column with the answer or answers"""
    type: str = ""
    """column with the question type; accuracy is also reported by type"""
    id: str = ""
    """column with the id of the row"""
    options: str = ""
    """column with the options of a multiple-choice question"""
    context: str = ""
    """column with text that stands before the question"""
    system: str = ""
    """column with a system prompt"""


class SourceConfig(Section):
    """One of several sources of training data. What is left out is as the run has it (data.…)."""

    path: str = Field(min_length=1)
    """a file, folder, glob, URI or hub data set id of raw data"""
    weight: float | None = Field(default=None, gt=0)
    """its share of an epoch, beside the weights of the other sources. No conversation is left out: the source that is
    furthest below its share is trained once, the others more often"""
    repeats: float | None = Field(default=None, gt=0)
    """how often its conversations are trained in an epoch; 0.5: half of them in one epoch, the others in the next;
    default: once"""
    max_samples: int | None = Field(default=None, ge=1)
    """as data.max_samples"""
    prompt: str | None = None
    """as data.prompt"""
    format: str | None = None
    """as data.format"""
    columns: ColumnsConfig | None = None
    """as data.columns"""
    ignore_columns: tuple[str, ...] | None = None
    """as data.ignore_columns"""
    option_answer: OptionAnswer | None = None
    """as data.option_answer"""
    answer_key: AnswerKey | None = None
    """as data.answer_key"""
    image_root: str | None = None
    """as data.image_root"""
    split: str | None = None
    """as data.split"""
    revision: str | None = None
    """as data.revision"""


def _sources(value: Any) -> Any:
    """Paths in a list as sources; a list of one path alone is that path."""
    if not isinstance(value, list | tuple):
        return value
    sources = [{"path": one} if isinstance(one, str) else one for one in value]
    alone = sources[0] if len(sources) == 1 else {}
    given = alone.model_dump(exclude_none=True) if isinstance(alone, SourceConfig) else alone
    return given["path"] if isinstance(given, dict) and [*given] == ["path"] else sources or ""


class DataConfig(Section):
    """The data, and how conversations become sequences of tokens."""

    train: Annotated[str | tuple[SourceConfig, ...], BeforeValidator(_sources)] = ""
    """raw data or prepared shards for training: a file, folder, glob, URI or hub data set id; or a list of such
    sources of raw data, each a path or a section with a path and settings of its own"""
    repeats: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """prepared shards of several sources: how often the conversations of each are trained in an epoch; a list in
    data.train says it itself"""
    validation: str = ""
    """raw data or prepared shards for evaluation; empty: no evaluation"""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """without data.validation: this share of the training conversations is held out for evaluation, whole images with
    all that is said of them, so that no image is on both sides"""
    max_samples: int | None = Field(default=None, ge=1)
    """most training conversations of each source, the first ones; nothing behind them is read"""
    shards: str = ""
    """where prepared shards are kept; default: STORAGE/shards"""
    format: str = "auto"
    """auto: recognised by file names; or the name of one format: `smolray/data/README.md` lists them"""
    columns: ColumnsConfig = ColumnsConfig()
    ignore_columns: tuple[str, ...] = ()
    """columns that are not read. A run stops where a column that looks like images, options, a system prompt or
    context is neither used nor named here"""
    option_answer: OptionAnswer = "letter"
    """what is trained as the answer of a multiple-choice question: `B`, `B. a cat` or `a cat`"""
    answer_key: AnswerKey = "auto"
    """how the answer column names the right option: its letter, its text, or its number from 0 or from 1; auto: what
    the value fits, and a row that fits two is quarantined"""
    text_only_ok: bool = False
    """true: rows without an image are meant, in a data set that has images or columns for them; otherwise a run
    stops where they are more than max_bad_fraction of the rows"""
    image_root: str = ""
    """folder that image paths are relative to; default: the folder of the file that names them"""
    allow_absolute_paths: bool = False
    """true: rows may name image files anywhere, by absolute paths, `..` and links; default: inside the source and
    image_root only"""
    fetch_urls: bool = False
    """true: images at http(s) URLs are fetched, from public addresses only, at most 32 MiB each"""
    prompt: str = ""
    """instruction put before each question; for caption data the whole question"""
    split: str = ""
    """split of a hub data set"""
    revision: str | None = None
    """branch, tag or commit of a hub data set"""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """prepare stops when a larger fraction of the rows is quarantined"""
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """larger images are quarantined as decompression bombs"""
    shard_bytes: int = Field(default=64 * 2**20, ge=2**16)
    """size of a prepared shard, about"""
    max_length: Literal["auto"] | Annotated[int, Field(ge=8)] = "auto"
    """longest sequence in tokens, packed or not; auto: 2048, or where conversations are longer the power of two that
    holds the longest, at most 8192, the model's context and train.micro_batch_tokens"""
    max_left_out_fraction: float = Field(default=0.1, ge=0, le=1)
    """a run stops before it trains when a larger fraction of the conversations is left out, because they are longer
    than max_length or hold no token to train on"""
    overlong: Literal["drop", "truncate_text", "error"] = "drop"
    """what happens to a longer conversation: leave it out, cut the end of its text, or stop the run; image tokens are
    never cut"""
    packing: Literal["none", "image", "full"] = "full"
    """image: all questions about an image share its tokens, with exactly the same loss; full: also place sequences end
    to end, without padding; none: one conversation a sequence"""
    max_questions_per_image: int = Field(default=16, ge=1)
    """most questions that share the tokens of one image"""
    augment: tuple[Augmentation, ...] = ()
    """random changes of training images, others in each epoch. flip: left-right, half of them; crop: 80 to 100 % of
    each edge; rotate: up to 10 degrees; color: brightness, contrast and saturation by up to 20 %; gray: a fifth of
    them; blur: up to 1.5 pixels; jpeg: quality 40 to 95. Leave out what changes an answer, such as flip where there is
    text"""
    num_cpus_per_task: float = Field(default=0.25, gt=0)
    """CPUs that Ray reserves for each data task"""
    prefetch_batches: int = Field(default=4, ge=0)
    """micro-batches that each worker fetches ahead"""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training data; none where there are no such data."""
        if isinstance(self.train, str):
            return (SourceConfig(path=self.train),) if self.train else ()
        return self.train

    @property
    def train_paths(self) -> dict[str, str]:
        """The sources' paths by their names in a message: `data.train`, or `data.train.0` and so on."""
        sources = self.sources
        return {"data.train" if len(sources) == 1 else f"data.train.{n}": one.path for n, one in enumerate(sources)}

    @property
    def train_folder(self) -> str:
        """The shards of training data that are prepared."""
        assert isinstance(self.train, str), "the data are not prepared yet"
        return self.train

    @property
    def evaluates(self) -> bool:
        """Whether there are validation data, given or held out."""
        return bool(self.validation or self.validation_fraction)

    def of_source(self, source: SourceConfig) -> Self:
        """The settings with which the rows of one source are read."""
        own = source.model_dump(exclude={"path", "weight", "repeats"}, exclude_none=True)
        return self.replace({"train": source.path, **own})

    def with_paths(self, change: Callable[[str], str]) -> str | tuple[SourceConfig, ...]:
        """`train` with each of its paths changed."""
        if isinstance(self.train, str):
            return change(self.train)
        return tuple(source.replace({"path": change(source.path)}) for source in self.train)
