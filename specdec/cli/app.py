"""The command line: `python -m specdec demo | info | train`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

# What a command needs is imported inside it: `specdec --help` waits for nothing.
app = typer.Typer(
    help="Lossless speculative decoding for PyTorch and transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Size(str, Enum):
    """Target of the demo: the bundled one, or the same function at the cost of a larger model."""

    bundled = "bundled"
    m25 = "25m"
    m100 = "100m"
    m300 = "300m"


class Draft(str, Enum):
    """Where drafts come from."""

    model = "model"
    ngram = "ngram"


def _to_be_written(path: Path | None) -> Path | None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return path


def _png(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"the plot is a PNG: {path.name} must end in .png")
    return _to_be_written(path)


@app.command()
def demo(
    json_file: Annotated[
        Path | None, Option("--json", help="Write the result as JSON.", dir_okay=False, callback=_to_be_written)
    ] = None,
    plot_file: Annotated[
        Path | None, Option("--plot", help="Write a plot (PNG).", dir_okay=False, callback=_png)
    ] = None,
    prompt: Annotated[str | None, Option(help="Python source to continue.  [default: a function's head]")] = None,
    size: Annotated[Size, Option(help="Target: the bundled one, or as costly as a larger model.")] = Size.bundled,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write.")] = 128,
    draft: Annotated[Draft, Option(help="Draft with the bundled model, or from the text's own n-grams.")] = Draft.model,
    repeats: Annotated[int, Option(min=1, help="Timed runs of each way to decode; medians are shown.")] = 5,
    compile: Annotated[bool, Option(help="Compile specdec's step, or run it eagerly.")] = True,
) -> None:
    """Decode a prompt with the bundled models, and compare speed and text with transformers.

    Exits with 1 if specdec's text differs from transformers', or was not decoded as asked for.
    """
    from specdec.cli import demo as demo_

    console = Console()
    text = demo_.PROMPT if prompt is None else prompt
    settings = demo_.Settings(text, size.value, draft.value, max_new_tokens, compile, repeats)
    try:
        result = demo_.run(settings, console)
    except (OSError, ValueError) as error:
        raise _failure(error) from None
    demo_.show(result, console)
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if plot_file is not None:
            demo_.plot(result, str(plot_file))
    except OSError as error:
        raise _failure(error) from None
    result["faults"].exit()


@app.command()
def info() -> None:
    """Show versions, device, compiler, the implementation of every op, and the bundled pair's figures."""
    from specdec.cli import info as info_

    info_.show(Console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train the bundled pair anew (`train --help` lists the options)."""
    from specdec.training.pair import train_pair

    trainer = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    trainer.command()(train_pair)
    trainer(args=context.args, prog_name=context.command_path)


def _failure(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, and end with 2 as for any bad option."""
    Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False)
    return typer.Exit(2)
