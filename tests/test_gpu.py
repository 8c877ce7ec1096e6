"""What only a CUDA device can show: a step that never waits, memory without copies of the vocabulary, real tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backend import static_loop
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import specdec
from bench import correct, tree_cases
from specdec.drafters.model import ModelDrafter
from specdec.engine.loop import Decoder
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.graphs.backend import specdec as backend
from specdec.graphs.captured import CapturedSteps
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.view import ModelView
from specdec.kernels.sampling.row_law import row_law

pytestmark = pytest.mark.gpu
Tiny = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not compile fails: run eagerly, it would give the same tokens."""
    monkeypatch.setenv("SPECDEC_STRICT", "1")


@pytest.mark.parametrize("draft", ["model", "ngram", None])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_greedy_texts_are_transformers_own(
    family: str, draft: str | None, fresh: Tiny, prompts: Callable[..., dict[str, Any]]
) -> None:
    target = fresh(family).cuda()
    drafter = fresh(family, seed=1).cuda() if draft == "model" else draft
    inputs = {name: x.cuda() for name, x in prompts([9, 4, 1]).items()}
    expected = target.generate(**inputs, max_new_tokens=24)
    model = specdec.compile(target, drafter, depth=3, compile=family == "llama")  # Inductor takes half a minute each
    assert torch.equal(model.generate(**inputs, max_new_tokens=24), expected)
    assert not model.specdec.stats.fallbacks


STEPS = {
    "kernel by kernel": lambda: CompiledSteps(False),
    "compiled": lambda: CompiledSteps(True),
    "recorded": lambda: CapturedSteps(CompiledSteps(True)),
}


@pytest.mark.parametrize("warps", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_decoding_never_waits_for_the_device(steps: str, do_sample: bool, warps: bool, fresh: Tiny) -> None:
    target, draft = (ModelView(fresh("llama", seed=seed).cuda()) for seed in (0, 1))
    decoder = Decoder(target, ModelDrafter(draft, TokenTree.chain(3)), STEPS[steps](), Stats(), adapt=False)
    law = correct.law_of(target.device, do_sample, warps)
    prompts = [torch.arange(1, n + 1, device="cuda") for n in (9, 4)]
    texts = correct.run_without_waiting(decoder, law, prompts, 64)
    assert [len(text.tokens) for text in texts] == [64, 64]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most device memory a call holds at once, beyond what was held before it; results count."""
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_a_law_costs_no_copy_of_the_logits() -> None:
    logits = torch.randn(64, 128256, device="cuda", dtype=torch.bfloat16)
    knobs = torch.tensor([1.3, 0.9, 0.0], device="cuda")
    assert peak_bytes(lambda: row_law(logits, knobs, 50)) < 1 << 20


def test_a_tree_is_drawn_and_verified_without_a_row_of_the_vocabulary() -> None:
    """8 trees of 64 nodes: less than one of the 512 rows in float32, or two in bfloat16. Children are drawn from laws
    of 64 ids, so the whole of the draft's results counts."""
    batch, widths, vocabulary = 8, (7, 2, 1, 1, 1), 128256
    for case in (
        tree_cases.draw(batch, widths),
        tree_cases.verify(batch, widths, vocabulary, torch.bfloat16),
    ):
        assert peak_bytes(case.ways(torch.device("cuda"))["op"]) < 4 * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backend_reads_a_static_cache(fresh: Tiny, dtype: torch.dtype) -> None:
    model = fresh("llama").to("cuda", dtype)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
        out = static_loop(compiled, model, ids, 24)
        if dtype == torch.float32:
            assert torch.equal(out, static_loop(model.forward, model, ids, 24))
    ops = [n.target for n in counter.graphs[0].graph.nodes]
    assert ops.count(torch.ops.specdec.masked_attention.default) == model.config.num_hidden_layers
