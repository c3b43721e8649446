"""The commands `smolray search build` and `smolray search query`: find images by text."""

from typing import Annotated

import typer

from smolray.cli.options import Checkpoint, Overrides, Storage, console, errors, plain

search_app = typer.Typer(no_args_is_help=True, help="Find images by text, with a run of method=retrieval.")


@search_app.command("build")
def build(
    model: Annotated[str, typer.Argument(help="a run of method=retrieval, or its export")],
    source: Annotated[
        str,
        typer.Argument(metavar="IMAGES", help="an image, a folder, a glob, or data in any layout that prepare reads"),
    ],
    out: Annotated[str, typer.Option(help="folder or URI of the index")],
    overrides: Overrides = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="text with each image, as in training; default: data.prompt, else that of captions"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images embedded together")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=1, help="models loaded at a time; default: one a GPU, else one a core")
    ] = None,
    checkpoint: Checkpoint = None,
    storage: Storage = "runs",
) -> None:
    """Embed images and write their index."""
    from smolray.inference.names import find_run

    find_run(model, storage)  # a mistyped name is told before torch is loaded
    from smolray.data.formats.layouts import CAPTION_PROMPT
    from smolray.inference.image_search import build_index
    from smolray.inference.predictor import find_model
    from smolray.inference.questions import PromptSettings, check_question_tasks, find_question_tasks

    found = find_model(model, storage, overrides or (), checkpoint)
    text = prompt if prompt is not None else found.config.data.prompt or CAPTION_PROMPT
    prompt_settings = PromptSettings(found.config.data, (text,))
    question_tasks = find_question_tasks(source, prompt_settings, batch_size)
    check_question_tasks(source, question_tasks, prompt_settings)
    errors.print(
        f"text with each image: {plain(repr(text))}. "
        "The vectors match those of training if training used the same text (--prompt)",
        soft_wrap=True,
    )

    failed = build_index(found, question_tasks, prompt_settings, out, batch_size, workers)
    reasons = ", ".join(f"{reason} {count}" for reason, count in failed.most_common())
    left_out = f"; left out: {failed.total():,} ({reasons})" if failed else ""
    errors.print(f"index in {plain(out)}{left_out}", soft_wrap=True)


@search_app.command("query")
def query(
    index: Annotated[str, typer.Argument(help="folder or URI that `search build` wrote")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="what to look for")],
    top: Annotated[int, typer.Option(min=1, help="images for each text")] = 10,
) -> None:
    """Print the images nearest to a text, best first: score, path."""
    from smolray.inference.image_search import ImageSearch

    for text, hits in zip(texts, ImageSearch(index).find(texts, top), strict=True):
        console.print(f"[dim]{plain(text)}[/dim]", soft_wrap=True)
        for hit in hits:
            named = hit.path if hit.path.endswith(hit.id) else f"{hit.path}#{hit.id}"
            console.print(f"{hit.similarity:.3f}  {plain(named)}", soft_wrap=True)
