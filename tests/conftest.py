"""What all tests share: one thread, tiny random models, and no CUDA tests where there is no CUDA."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub must not be waited for; read when transformers is imported

import pytest
import torch
from families import VOCAB, make_tiny
from transformers import PreTrainedModel

import specdec
import specdec.api  # whole: what is imported while a test has patched a constant would keep it

pytest.register_assert_rewrite("aot", "side_by_side", "trees")  # their asserts show what they compared, as tests' do
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that leaves more makes all after it wait for threads that have no core."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"the test has left {left} threads"


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny("llama", seed=1, hidden_size=16)`: a random model, the same object every time. Tests must not change it."""
    return cache(make_tiny)


@pytest.fixture(scope="session")
def fresh() -> Callable[..., PreTrainedModel]:
    """As `tiny`, but a new object every time, which a test may change."""
    return make_tiny


@pytest.fixture
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A Llama that tests must not change."""
    return tiny("llama")


@pytest.fixture
def wrapped(model: PreTrainedModel, tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """`model` with a draft that is often wrong."""
    return specdec.compile(model, draft=tiny("llama", seed=7, num_hidden_layers=1), depth=3, compile=False)


@pytest.fixture(scope="session")
def prompts() -> Callable[..., dict[str, torch.Tensor]]:
    """`prompts([7, 3, 1])`: input ids and attention mask of random prompts of these lengths, padded on the left."""

    def make(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, max(lengths) - length :] = torch.randint(1, vocab, (length,), generator=generator)
            mask[row, max(lengths) - length :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests of the kernels put their tensors: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, or of a number far from any index: an element that nobody writes shows."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch, "empty", poison)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compiled-table", help="write what ahead-of-time compilation gave to this Markdown file")


@pytest.fixture(scope="session")
def compiled_table(pytestconfig: pytest.Config) -> Iterator[list[tuple[str, int, Any]]]:
    """Rows (case, architecture, `aot.Compiled`) of what this run compiled ahead of time."""
    rows: list[tuple[str, int, Any]] = []
    yield rows
    if path := pytestconfig.getoption("compiled_table"):
        lines = ["| kernel | case | architecture | registers | stack | shared memory |", "|---|---|---|---:|---:|---:|"]
        lines += [
            f"| {k.name} | {case} | sm_{arch} | {k.registers} | {k.stack} | {k.shared} |" for case, arch, k in rows
        ]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is also the name of the folder
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
