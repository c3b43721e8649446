"""The command `smolray generate`: what people do with a fine-tuned model: captions, answers, assisted writing."""

import time
from collections import Counter
from typing import Annotated, Any

import typer

from smolray.cli.options import Storage, console, errors, plain

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
        str, typer.Option(help="column with the questions; --prompt then stands before each")
    ] = "",
    out: Annotated[str | None, typer.Option(help="answers.parquet or answers.jsonl; default: the terminal")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="sample from the most likely tokens that hold this share")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of sampling; an answer does not depend on what is asked beside it")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="questions answered together")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=1, help="models held at a time; default: one a GPU, else one a core")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="of a run; default: the best, else the newest")] = None,
    storage: Storage = "runs",
) -> None:
    """Ask a model about images or rows: smolray generate MODEL INPUT --prompt 'Describe the image.' --out
    answers.parquet
    """
    from smolray.inference.generate import answers, require_suffix, writing
    from smolray.inference.predictor import Decoding, find_model
    from smolray.inference.questions import Asking, check_pieces, find_pieces

    if out:
        require_suffix(out)
    settings = [*(overrides or ()), *([f"data.columns.question={question_column}"] if question_column else ())]
    found = find_model(model, storage, settings, checkpoint)
    pieces, asking = find_pieces(source, Asking(found.config.data, tuple(prompt or ())), batch_size)
    check_pieces(source, pieces, asking)
    tables = answers(found, pieces, asking, Decoding(max_new_tokens, temperature, top_p, seed), batch_size, workers)
    told = _Told()
    if out:
        with writing(out) as write:
            for table in tables:
                write(table)
                told.add(table)
    else:
        for table in tables:
            for row in table.to_pylist():
                _show(row)
            told.add(table, quiet=True)
    errors.print(told.summary() + (f": {plain(out)}" if out else ""), soft_wrap=True)
    if not told.answered:
        raise typer.Exit(1)


def _show(row: dict[str, Any]) -> None:
    """An answer under a dim line with its place and prompt."""
    console.print(f"[dim]{plain(row['id'])}  {plain(row['prompt'])}[/dim]", soft_wrap=True)
    console.print(f"[red]{plain(row['error'])}[/red]" if row["error"] else plain(row["text"]), soft_wrap=True)


class _Told:
    """Counts of answers and errors, said while they grow and at the end."""

    def __init__(self) -> None:
        self.answered, self.failed = 0, Counter[str]()
        self.began = self.said = time.monotonic()

    def add(self, table: Any, quiet: bool = False) -> None:
        for error in table["error"].to_pylist():
            self.answered += error is None
            self.failed.update([error.partition(":")[0]] if error else ())
        if not quiet and time.monotonic() - self.said > PROGRESS_SECONDS:
            self.said = time.monotonic()
            errors.print(f"{self.summary()}, {self.answered / (self.said - self.began):.1f} answers/s")

    def summary(self) -> str:
        """`1,203 answers, 3 errors (corrupt_image 2, missing_file 1)`"""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.failed.most_common())
        failed = self.failed.total()
        return f"{self.answered:,} answer{'s' * (self.answered != 1)}" + (
            f", {failed:,} error{'s' * (failed != 1)} ({reasons})" if failed else ""
        )
