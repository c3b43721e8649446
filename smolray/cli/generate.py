"""The command `smolray generate`: captions and answers from a fine-tuned model."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from smolray.cli.options import Checkpoint, Storage, console, errors, plain

PROGRESS_SECONDS = 10


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a run's name, or a folder or hub id that transformers loads")
    ],
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="an image, a folder, a glob, or data in any layout that prepare reads"),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="such as image.max_tiles=5 model.dtype=float32")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="asked of every image; may be given several times")
    ] = None,
    question_column: Annotated[
        str, typer.Option(help="column with the questions; --prompt is then put before each")
    ] = "",
    out: Annotated[str | None, typer.Option(help="answers.parquet or answers.jsonl; default: the terminal")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=1e-6, max=1, help="sample from the most likely tokens whose probabilities reach this sum"),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="for sampling; an answer does not depend on the other questions")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="questions answered together")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=1, help="models loaded at a time; default: one a GPU, else one a core")
    ] = None,
    checkpoint: Checkpoint = None,
    storage: Storage = "runs",
) -> None:
    """Ask a model about images or rows of data.

    Example: smolray generate MODEL INPUT --prompt 'Describe the image.' --out answers.parquet
    """
    from smolray.inference.names import find_run

    find_run(model, storage)  # a mistyped name is told before torch is loaded
    from smolray.inference.generate import answers, require_suffix
    from smolray.inference.predictor import Decoding, find_model
    from smolray.inference.questions import PromptSettings, check_question_tasks, find_question_tasks

    if out:
        require_suffix(out)
    settings = [*(overrides or ()), *([f"data.columns.question={question_column}"] if question_column else ())]
    found = find_model(model, storage, settings, checkpoint)
    prompt_settings = PromptSettings(found.config.data, tuple(prompt or ()))
    question_tasks = find_question_tasks(source, prompt_settings, batch_size)
    check_question_tasks(source, question_tasks, prompt_settings)

    tables = answers(
        found, question_tasks, prompt_settings, Decoding(max_new_tokens, temperature, top_p, seed), batch_size, workers
    )
    tally = _write(tables, out) if out else _print(tables)
    errors.print(tally.summary() + (f": {plain(out)}" if out else ""), soft_wrap=True)
    if not tally.answered:
        raise typer.Exit(1)


def _write(tables: Iterator[Any], out: str) -> "_Tally":
    from smolray.inference.generate import writing

    tally = _Tally()
    with writing(out) as write:
        for table in tables:
            write(table)
            tally.add(table)
    return tally


def _print(tables: Iterator[Any]) -> "_Tally":
    tally = _Tally()
    for table in tables:
        for row in table.to_pylist():
            _show(row)
        tally.add(table, quiet=True)
    return tally


def _show(row: dict[str, Any]) -> None:
    """An answer below a dim line with its place and prompt."""
    console.print(f"[dim]{plain(row['id'])}  {plain(row['prompt'])}[/dim]", soft_wrap=True)
    console.print(f"[red]{plain(row['error'])}[/red]" if row["error"] else plain(row["text"]), soft_wrap=True)


class _Tally:
    """Counts answers and errors, and prints the counts every PROGRESS_SECONDS."""

    def __init__(self) -> None:
        self.answered, self.failed = 0, Counter[str]()
        self.began = self.printed = time.monotonic()

    def add(self, table: Any, quiet: bool = False) -> None:
        for error in table["error"].to_pylist():
            self.answered += error is None
            self.failed.update([error.partition(":")[0]] if error else ())
        if not quiet and time.monotonic() - self.printed > PROGRESS_SECONDS:
            self.printed = time.monotonic()
            errors.print(f"{self.summary()}, {self.answered / (self.printed - self.began):.1f} answers/s")

    def summary(self) -> str:
        """As in `1,203 answers, 3 errors (corrupt_image 2, missing_file 1)`."""
        answered = f"{self.answered:,} answer{'s' * (self.answered != 1)}"
        if not (failed := self.failed.total()):
            return answered
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.failed.most_common())
        return f"{answered}, {failed:,} error{'s' * (failed != 1)} ({reasons})"
