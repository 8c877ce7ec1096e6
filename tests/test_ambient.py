"""What a script sets for all of torch (its default dtype and device, deterministic mode, threads, grad modes) changes
nothing here: numbers that C++ and Triton read have the dtypes that they read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.kernels.cpu import address, bind
from specdec.kernels.noise import uniform

ROOT = Path(__file__).resolve().parents[1]
MAKERS = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def sources() -> Iterator[Path]:
    for folder in ("kernels", "graphs", "specdec"):
        yield from (p for p in (ROOT / folder).rglob("*.py") if p.relative_to(ROOT).parts[:2] not in LINKS)


LINKS = ("specdec", "kernels"), ("specdec", "graphs")


def test_tensors_are_made_with_a_dtype_and_a_device() -> None:
    """Of their own: torch's defaults are the user's."""
    found, n_calls = [], 0
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
                n_calls += 1
                wanted = {"device"} if ast.unparse(node.func) == "torch.as_tensor" else {"dtype", "device"}
                if not wanted <= {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert n_calls > 50
    assert found == []


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float16": lambda: _default_dtype(torch.float16),
    "meta": lambda: _default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "deterministic": _deterministic,
    "threads": _threads,
    "inference mode": torch.inference_mode,
    "grad mode": torch.enable_grad,
}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    "typical": {"do_sample": True, "typical_p": 0.9},
    "processors": {"do_sample": True, "repetition_penalty": 1.3},
}


def _texts(wrapped: PreTrainedModel, ids: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    texts = []
    for asked in ASKED.values():
        if asked:
            wrapped.specdec.seeds = [3, 4]
        texts.append(wrapped.generate(**ids, max_new_tokens=12, eos_token_id=3, pad_token_id=0, **asked).tolist())
    many = specdec.generate_many(wrapped, [row.tolist() for row in ids["input_ids"]], max_new_tokens=9, progress=False)
    return [*texts, [result.tokens.tolist() for result in many]]


@pytest.mark.filterwarnings("error::specdec.SpecdecWarning")
@pytest.mark.parametrize("draft", ["model", "tree", "ngram"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_do_not_depend_on_it(setting: str, draft: str, tiny: Tiny, prompts: Prompts) -> None:
    """Neither where a wrapping is made and used, nor where it is only used, under it."""
    model, other, ids = tiny("llama"), tiny("llama", seed=7, num_hidden_layers=1), prompts([5, 5])

    def make() -> PreTrainedModel:
        if draft == "ngram":
            return wrap(model)
        return wrap(model, other, **({"tree": TokenTree.from_widths(2, 2)} if draft == "tree" else {"depth": 3}))

    before = make()
    expected = _texts(before, ids)
    with SETTINGS[setting]():
        assert _texts(before, ids) == expected
        assert _texts(make(), ids) == expected
    assert _texts(before, ids) == expected


def test_compiled_steps() -> None:
    """In a process of its own, which the fault that this is about would end."""
    code = """
import sys
sys.path.insert(0, "tests")
import torch, specdec
from families import make_tiny
model, draft, ids = make_tiny("llama"), make_tiny("llama", seed=7), torch.tensor([[5, 6, 7]])
def text(compiled):
    wrapped = specdec.compile(model, draft, depth=2, compile=compiled)
    wrapped.specdec.seeds = [5]
    out = wrapped.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9)
    assert not wrapped.specdec.stats.fallbacks
    return out.tolist()
expected = text(False)
torch.set_default_dtype(torch.bfloat16)
assert text(True) == expected, (text(True), expected)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:specdec", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_a_kernel_cannot_read_is_refused() -> None:
    """By whoever hands it its address."""
    good = torch.zeros(4, 3, dtype=torch.float32, device="cpu")
    assert address(good, torch.float32) == good.data_ptr()
    for bad in (good.double(), good.long(), good.to("meta"), good.t()):
        with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.float32 on a CPU, got"):
            address(bad, torch.float32)
    kernel = bind('extern "C" void kernel(const float* x, int64_t* y) { y[0] = int64_t(x[0]); }', "float*, int64_t*")
    out = torch.zeros(1, dtype=torch.int64, device="cpu")
    kernel(good + 2, out)
    assert out.tolist() == [2]
    for x, y in ((good.double(), out), (good, out.int()), (good.bfloat16(), out)):
        with pytest.raises(TypeError, match="a kernel reads torch"):
            kernel(x, y)
    with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.int64"):
        uniform(out.int(), out, out, 0)
