"""Whole `generate()` calls on the Triton kernels: in the interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec.kernels.library import INTERPRETED
from specdec.kernels.linear import joined_linear

pytestmark = pytest.mark.kernels
LENGTHS = [7, 1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_texts_are_transformers_own(
    family: str, device: torch.device, fresh: Callable[..., PreTrainedModel], prompts: Callable[..., dict[str, Any]]
) -> None:
    target, draft = (fresh(family, seed=seed, num_hidden_layers=2 - seed).to(device) for seed in (0, 1))
    inputs = {name: x.to(device) for name, x in prompts(LENGTHS).items()}
    expected = target.generate(**inputs, max_new_tokens=6)
    model = specdec.compile(target, draft, depth=2, compile=device.type == "cuda")
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)
    assert not model.specdec.stats.fallbacks
    assert model.specdec.stats.steps > 0


@pytest.mark.skipif(not INTERPRETED, reason="compiles a step around interpreted kernels")
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_a_step_compiles_around_the_kernels(
    do_sample: bool, tiny: Callable[..., PreTrainedModel], prompts: Callable[..., dict[str, Any]]
) -> None:
    """As on a GPU, where the compiled step is what is recorded: same tokens as kernel by kernel."""
    target, draft = (tiny("llama", seed=seed, num_hidden_layers=1) for seed in (0, 1))
    texts = []
    for compiled in (False, True):
        model = specdec.compile(target, draft, depth=1, adapt=False, compile=compiled)
        model.specdec.seeds = [5, 6]
        texts.append(model.generate(**prompts(LENGTHS), max_new_tokens=3, do_sample=do_sample, top_k=0))
        assert not model.specdec.stats.fallbacks
    assert model.specdec.stats.seconds["compile"] > 0
    assert torch.equal(*texts)


@pytest.mark.skipif(not INTERPRETED, reason="compiles a step around interpreted kernels")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_computed_at_once_give_the_same_texts(
    family: str, fresh: Callable[..., PreTrainedModel], prompts: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In half precision, and with the biases that Qwen2 has, as on a GPU: texts are transformers' own."""
    started = []
    for name in ("_joined_linear_kernel", "_gated_linear_kernel"):
        kernel = getattr(joined_linear, name)

        def start(*args: Any, name: str = name, run: Any = kernel.run, **kwargs: Any) -> Any:
            started.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", start)
    target = fresh(family, num_hidden_layers=1).to(torch.float16)
    for name, x in target.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(x, generator=torch.Generator().manual_seed(len(x)))
    inputs = prompts(LENGTHS)
    model = specdec.compile(target, "ngram", adapt=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), target.generate(**inputs, max_new_tokens=4))
    assert not model.specdec.stats.fallbacks and not model.specdec.stats.eager
    n_steps = model.specdec.stats.steps
    assert started[-2:] == ["_joined_linear_kernel", "_gated_linear_kernel"]
    assert len(started) >= 2 * n_steps > 0


@pytest.mark.skipif(not INTERPRETED, reason="compares the interpreted kernels with the CPU's implementations")
def test_equal_seeds_draw_equal_texts_on_either_path() -> None:
    here, there = (_sampled_elsewhere(interpret) for interpret in ("1", "0"))
    assert here == there
    assert len({tuple(text) for text in here}) > 1


def _sampled_elsewhere(interpret: str) -> list[list[int]]:
    env = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _sample() -> list[list[int]]:
    """Texts of a ragged batch under three sampling laws."""
    from families import VOCAB, make_tiny

    target, draft = (make_tiny("llama", num_hidden_layers=n) for n in (2, 1))
    model = specdec.compile(target, draft, depth=2, compile=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, 5), generator=generator)
    texts = []
    for law in ({"top_k": 0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"min_p": 0.05, "top_k": 0}):
        model.specdec.seeds = [11, 12]
        texts += model.generate(ids, do_sample=True, max_new_tokens=2, **law)[:, 5:].tolist()
    return texts


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(_sample()))
