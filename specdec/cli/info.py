"""What `specdec info` shows: whether a machine, its versions and a model decode, and if not what to do."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

import specdec
import specdec.kernels
from specdec import zoo
from specdec.cli import inputs, measure
from specdec.errors import SpecdecWarning, Unsupported
from specdec.hf import names
from specdec.kernels.cpu import compiler_error, compiler_name
from specdec.kernels.library import OPS, triton

TRIAL_TOKENS = 8


def ops() -> Iterator[tuple[str, str, str]]:
    """Name of every op, and what runs for tensors on a CPU and on a GPU."""
    for module in pkgutil.walk_packages(specdec.kernels.__path__, "specdec.kernels."):
        importlib.import_module(module.name)
    for name, op in sorted(OPS.items()):
        yield name, op.path("cpu"), op.path("cuda")


def compiler() -> str:
    """The C++ compiler that Inductor and the C++ kernels are built with, or what to do where there is none."""
    if error := compiler_error():
        return (
            f"none that works ({error}). Steps run eagerly, slower, with the same tokens: install g++ or clang, or "
            "name one in the environment variable CXX"
        )
    done = subprocess.run([compiler_name(), "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [compiler_name()])[0]


def device() -> str:
    """What models run on."""
    has_triton = "Triton is not installed" if triton is None else "Triton is there"
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU; torch sees no CUDA device"
    return f"{found}; {has_triton}"


def machine_problem() -> str | None:
    """Why no model decodes here, and what to do; None where models do."""
    try:
        names.check()
    except Unsupported as why:
        return str(why)
    if torch.cuda.is_available() and triton is None:
        return "CUDA without Triton: install it (pip install triton), or decode on the CPU"
    return None


def model_problem(pair: inputs.Pair, draft: Any) -> str | None:
    """Why a few tokens were not decoded here as asked for; None if they were.

    Raises:
        TypeError, ValueError: the draft does not fit to the target.
    """
    model = specdec.compile(pair.target, draft, compile=False, **pair.tokenizers)
    prompt = pair.tokenizer(inputs.PROMPTS[0], return_tensors="pt").input_ids.to(model.device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SpecdecWarning)
        measure.Path("", model)(prompt, TRIAL_TOKENS)
    try:
        measure.check("it", model.specdec.stats)
    except measure.NotMeasured as why:
        return next((str(w.message) for w in said if issubclass(w.category, SpecdecWarning)), str(why))
    return None


def figures() -> Iterator[tuple[str, str]]:
    """Name and value of what training measured, one line a group."""
    for group, value in zoo.metrics().items():
        if isinstance(value, dict):
            yield group, ", ".join(f"{name.replace('_', ' ')} {_short(number)}" for name, number in value.items())
        else:
            yield group.replace("_", " "), _short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show(console: Console, model: str | None, draft: str | None, verbose: bool) -> bool:
    """Print whether this machine, these versions and this model decode here; returns whether they do.

    Args:
        model, draft: as for `inputs.Sources`; without them nothing is loaded.
        verbose: every op, and the bundled pair's figures, too.

    Raises:
        TypeError, ValueError: a model cannot be loaded, or the draft does not fit to it.
    """
    measure.quiet()
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in measure.versions().items()),
        "machine": ", ".join(f"{name} {value}" for name, value in measure.machine().items()),
        "device": device(),
        "C++ compiler": compiler(),
    }
    problem, what = machine_problem(), "models that are supported decode here; `specdec info --model M` tries one"
    if model is not None or draft is not None:
        with console.status("loading, and decoding a few tokens"):
            pair = inputs.Sources(model, draft, device=inputs.default_device()).load()
            rows["model"] = _about(pair.target)
            if pair.draft is not None:
                rows["draft"] = _about(pair.draft)
            if pair.tokenizers:
                rows["tokenizers"] = "differ: give specdec.compile both, as tokenizer= and draft_tokenizer="
            problem = problem or model_problem(pair, "ngram" if draft == "ngram" else pair.draft)
            what = f"this model decodes here: {TRIAL_TOKENS} tokens did"
    table = _table()
    for name, text in rows.items():
        table.add_row(name, Text(text))
    if problem is None:
        table.add_row("verdict", Text(what, style="green"))
    else:
        table.add_row("verdict", Text(problem, style="red"))
        table.add_row("", "Calls of generate() still work, by transformers' own loop. What decodes: docs/models.md.")
    console.print(table)
    if verbose:
        _show_all(console)
    return problem is None


def _about(model: PreTrainedModel) -> str:
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    hint = ", which is slow on a CPU: load it with dtype=torch.float32" if _is_slow(model) else ""
    return f"{type(model).__name__}, {size:.0f}M parameters, {dtype}{hint}"


def _is_slow(model: PreTrainedModel) -> bool:
    """Whether the C++ kernels are not for it."""
    return model.device.type == "cpu" and model.dtype != torch.float32


def _show_all(console: Console) -> None:
    """Every op, and the figures of the bundled pair."""
    table = _table("ops", "op", "on a CPU", "on a GPU")
    for row in ops():
        table.add_row(*row)
    console.print(table)
    table = _table("bundled pair")
    for name, text in figures():
        table.add_row(name, text)
    console.print(table)


def _table(title: str = "", *columns: str) -> Table:
    table = Table(title=f"\n{title}" if title else None, title_justify="left", title_style="bold", box=None)
    table.padding, table.header_style, table.show_header = (0, 2, 0, 0), "dim", bool(columns)
    for column in columns or ("", ""):
        table.add_column(column)
    table.columns[0].no_wrap = True
    return table
