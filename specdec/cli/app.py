"""The command line: `python -m specdec demo | bench | info | train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

# What a command needs is imported inside it: `specdec --help` waits for nothing.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from specdec import __version__

        print(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Lossless speculative decoding for PyTorch and transformers."""


class Size(str, Enum):
    """Target of the demo: the bundled one, or the same function at the cost of a larger model."""

    bundled = "bundled"
    m25 = "25m"
    m100 = "100m"
    m300 = "300m"


class Dtype(str, Enum):
    """What a model computes in; auto is what it was saved in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Draft(str, Enum):
    """Where drafts come from."""

    both = "both"
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


JsonFile = Annotated[
    Path | None, Option("--json", help="Write the result as JSON.", dir_okay=False, callback=_to_be_written)
]
PlotFile = Annotated[Path | None, Option("--plot", help="Write a plot (PNG).", dir_okay=False, callback=_png)]
Compile = Annotated[bool, Option(help="Compile specdec's step, or run it eagerly.")]
Model = Annotated[str | None, Option(help="Folder or hub id.  [default: the bundled pair]")]
DraftModel = Annotated[str | None, Option(help="Folder or hub id of a draft model, or ngram.")]


@app.command()
def demo(
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    prompt: Annotated[str | None, Option(help="Python source to continue.  [default: a function's head]")] = None,
    size: Annotated[Size, Option(help="Target: the bundled one, or as costly as a larger model.")] = Size.bundled,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens to write.")] = 128,
    draft: Annotated[
        Draft, Option(help="Draft with the bundled model, from the text's own n-grams, or by both.")
    ] = Draft.both,
    repeats: Annotated[int, Option(min=1, help="Timed runs of each way to decode; medians are shown.")] = 5,
    compile: Compile = True,
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
    _write(json_file, result, plot_file, partial(demo_.plot, result))
    result["faults"].exit()


@app.command()
def bench(
    model: Model = None,
    draft: DraftModel = None,
    prompts: Annotated[
        Path | None,
        Option(
            help='A prompt a line; a file.jsonl has {"prompt": "..."} in each. Chat templates are not applied. '
            " [default: a few built in]",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    size: Annotated[
        Size, Option(help="Of the bundled target, without --model: as costly as a larger one.")
    ] = Size.bundled,
    dtype: Annotated[Dtype, Option(help="Of both models.")] = Dtype.auto,
    device: Annotated[str | None, Option(help="Of both models.  [default: cuda where there is one, else cpu]")] = None,
    batch: Annotated[int, Option(min=1, help="Prompts decoded at once.")] = 1,
    temperature: Annotated[float, Option(min=0, help="0 decodes greedily.")] = 0.0,
    new_tokens: Annotated[int, Option(min=1, help="Tokens to write after each prompt.")] = 128,
    repeats: Annotated[int, Option(min=1, help="Timed rounds; medians are shown.")] = 5,
    compile: Compile = True,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Compare the ways to decode a model of yours, and say which one to take.

    transformers' generate(), its assisted generation, specdec without a draft, with n-grams and with a draft model
    decode the same prompts in turns. Ctrl-C ends it with what is measured so far, and exit code 130. Exits with 1 if a
    way failed, or if specdec's text differs from transformers' by more than rounding.
    """
    from specdec.cli import bench as bench_
    from specdec.cli import inputs, report

    console = Console()
    try:
        sources = inputs.Sources(model, draft, size.value, dtype.value, device or inputs.default_device())
        settings = bench_.Settings(sources, prompts, batch, temperature, new_tokens, repeats, compile)
        result = bench_.run(settings, console)
    except (OSError, ValueError) as error:
        raise _failure(error) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted before anything was measured")
        raise typer.Exit(130) from None
    report.show(result, console)
    _write(json_file, result.to_dict(), plot_file if result.ways else None, partial(report.plot, result))
    if result.interrupted:
        result.faults.say()
        raise typer.Exit(130)
    result.faults.exit()


@app.command()
def info(
    model: Model = None,
    draft: DraftModel = None,
    verbose: Annotated[bool, Option("--verbose", help="Every op, and the bundled pair's figures, too.")] = False,
) -> None:
    """Say whether this machine, these versions and this model will decode here, and if not what to do.

    Exits with 1 if not.
    """
    from specdec.cli import info as info_

    try:
        decodes = info_.show(Console(), model, draft, verbose)
    except (OSError, TypeError, ValueError) as error:
        raise _failure(error) from None
    raise typer.Exit(not decodes)


training = typer.Typer(no_args_is_help=True, help="Train a draft for a model of yours, or the bundled pair anew.")
app.add_typer(training, name="train")
# The trainers' own options are read by what is imported inside the commands.
theirs = training.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)


@theirs
def draft(context: typer.Context) -> None:
    """Distil a small draft from a model, on your text and on the model's own (`train draft --help`: its options)."""
    from specdec.cli.train import train_draft

    _train(context, train_draft)


@theirs
def adaptive_tokens(context: typer.Context) -> None:
    """Train adaptive tokens, by which a model drafts for itself (`train adaptive-tokens --help`: its options)."""
    from specdec.cli.adaptive import train_adaptive

    _train(context, train_adaptive)


@theirs
def pair(context: typer.Context) -> None:
    """Train the bundled pair anew (`train pair --help`: its options)."""
    from specdec.training.pair import train_pair

    _train(context, train_pair)


def _train(context: typer.Context, function: Callable[..., Any]) -> None:
    # Without markup: it would take "[default: ...]" for some.
    trainer = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    trainer.command()(function)
    try:
        trainer(args=context.args, prog_name=context.command_path)
    except (OSError, ValueError) as error:
        raise _failure(error) from None


def _write(json_file: Path | None, result: dict[str, Any], plot_file: Path | None, plot: Callable[[str], None]) -> None:
    """The files that were asked for."""
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if plot_file is not None:
            plot(str(plot_file))
    except OSError as error:
        raise _failure(error) from None


def _failure(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, and end with 2 as for any bad option."""
    Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False)
    return typer.Exit(2)
