"""The compiled step: one graph, nothing asked of the host, no recompilation, the same tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import specdec
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.control import Adaptive
from specdec.engine.loop import Decoder
from specdec.engine.slots import Rows
from specdec.engine.state import BatchState
from specdec.engine.stats import Stats
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.graphs import backend
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.cache import Way
from specdec.hf.laws import law_of
from specdec.hf.view import ModelView
from specdec.kernels.verify.verify_greedy import verify_greedy_reference
from specdec.verifiers import VERIFIERS

# Operators that read device memory on the host, or whose output shape depends on values.
HOST_READS = ("_local_scalar_dense", "item", "nonzero", "tolist", "masked_select", "unique", "cpu", "numpy", "equal")
WARPERS = [
    TemperatureLogitsWarper(0.8),
    TopKLogitsWarper(20),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.02),
    TypicalLogitsWarper(0.95),
]


def llama(n_layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # random models of small weights repeat one token
    return model


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return llama(2, 0)


@pytest.fixture(scope="module")
def draft() -> LlamaForCausalLM:
    return llama(1, 1)


def random_prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(1, 96, (n,)) for n in lengths]


def filled(decoder: Decoder, prompts: list[torch.Tensor], new: int, eos: torch.Tensor) -> tuple[BatchState, Rows]:
    """A batch of these prompts, ready to step."""
    room = max(map(len, prompts))
    state = decoder.buffers.open(len(prompts), room + new, room, eos)
    texts = iter([Text(p, new, seed) for seed, p in enumerate(prompts)])
    rows = Rows(texts, state, decoder.target, decoder.drafter, decoder.buffers.grow)
    assert not rows.fill(len(prompts))
    while rows.is_writing:
        assert not rows.write()
    return state, rows


@pytest.mark.parametrize(
    ("n_batch", "kind", "fused", "do_sample"),
    [
        *((1, kind, True, False) for kind in ("none", "ngram", "chain")),
        *((3, kind, True, False) for kind in ("ngram", "chain", "tree")),
        *((1, kind, True, True) for kind in ("none", "chain")),
        *((3, kind, True, True) for kind in ("ngram", "chain", "tree", "coupled tree")),
        (1, "chain", False, False), (3, "tree", False, True),
    ],
)  # fmt: skip
def test_a_step_is_one_graph_without_host_reads(target, draft, kind, do_sample, n_batch, fused, monkeypatch):
    torch._dynamo.reset()
    verifier = VERIFIERS["coupled" if "coupled" in kind else "auto"]
    tree = TokenTree.from_widths(2, 2, 1) if "tree" in kind else TokenTree.chain(3)
    view, own = ModelView(target), ModelView(draft)
    drafter = {"none": NoDrafter, "ngram": NgramDrafter}.get(kind, lambda: ModelDrafter(own, tree, verifier))()
    view.cache.way = Way.FUSED if fused else Way.MASKED
    if isinstance(drafter, ModelDrafter):
        drafter.view.cache.way = Way.FUSED if fused else Way.MASKED
    decoder = Decoder(view, drafter, CompiledSteps(False), Stats(), verifier)
    law = law_of(LogitsProcessorList(WARPERS if do_sample else []), do_sample, view.device)
    prompts = random_prompts(*[5, 1, 9][:n_batch])
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list, **_: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(backend, "specdec", record)
    steps = CompiledSteps(True)
    with torch.no_grad():
        reports = {}
        for name, draft_, judge in (
            ("eager", decoder.step.draft, decoder.step.judge),
            ("traced", *(steps.get(f, f.__name__, 0) for f in (decoder.step.draft, decoder.step.judge))),
        ):
            state, rows = filled(decoder, prompts, 8, torch.tensor([3]))
            rows.read(rows.live, rows.live)
            state.allowed.fill_(len(decoder.tree) - 1)
            reports[name] = []
            for _ in range(3):
                draft_(state, law, decoder.launcher.count(n_batch), decoder.tree.depth)
                reports[name].append(judge(state, law, decoder.launcher.count(n_batch * len(decoder.tree))))
    assert torch.equal(torch.cat(reports["eager"]), torch.cat(reports["traced"]))
    assert len(graphs) == 2
    modules = [m for graph in graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {
        node.target if isinstance(node.target, str) else node.target.__name__.split(".")[0]
        for module in modules
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method")
    }
    assert {"gather", "argmax", "scatter_"} <= called  # these names are what the graphs call
    assert not called & set(HOST_READS)


def test_the_deny_list_sees_a_host_read():
    """The check above can fail: a step that asked the host would not trace as one graph."""

    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum().item() > 0 else x

    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(asks, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_no_recompilation_over_mixed_steps(target, draft, do_sample):
    """200 compiled steps of texts, alone or in ragged batches, that finish at different times and outgrow their cache.

    Batches that sample are in tests/test_joining.py.
    """
    source, sizes = (draft, (1,)) if do_sample else ("ngram", (1, 2))
    model, eager = (specdec.compile(target, source, depth=2, adapt=False, compile=how) for how in (True, False))
    torch.manual_seed(0)
    settings = {"do_sample": do_sample, "eos_token_id": [5, 6, 7], "pad_token_id": 0}
    if do_sample:
        settings |= {"top_k": 0, "temperature": 1.0}
    model.specdec.warmup(sizes, **settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        while model.specdec.stats.steps < 200:
            n_batch = 1 if do_sample else int(torch.randint(1, 6, ()))
            width = int(torch.randint(4, 300, ()))
            ids = torch.randint(8, 96, (n_batch, width))
            mask = (torch.arange(width) >= torch.randint(0, width - 1, (n_batch, 1))).long()
            length = int(torch.randint(1, 60, ()))
            out = model.generate(ids, attention_mask=mask, max_new_tokens=length, **settings)
            eager.specdec.seeds = model.specdec.seeds
            same = eager.generate(ids, attention_mask=mask, max_new_tokens=length, **settings)
            assert torch.equal(out, same)
            if not do_sample:
                assert torch.equal(out, target.generate(ids, attention_mask=mask, max_new_tokens=length, **settings))
    assert model.specdec.stats.seconds["compile"] == 0
    assert not model.specdec.stats.fallbacks
    assert model.specdec.stats.tokens > 200


def test_what_the_controller_may_choose_compiles(target, monkeypatch):
    """For one sample, whose undrafted step has shapes of its own, and for several: nothing, a level, everything."""

    def plan(self, samples):
        return self.uniform(len(samples), next(turns) % (self.shape.n_levels + 1), self.shape.depths[-1])

    monkeypatch.setattr(Adaptive, "plan", plan)
    model = specdec.compile(target, "ngram", depth=2)
    for n_batch in (1, 3):
        turns = itertools.count()
        ids = torch.randint(1, 96, (n_batch, 7))
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **settings), target.generate(ids, **settings))
    assert 0 < model.specdec.stats.undrafted < model.specdec.stats.steps


@pytest.mark.parametrize("depth", [1, 2])
def test_a_short_chain_is_judged_by_code_that_compiles(depth):
    """Inductor writes bools that are padded in a vectorised kernel as C++ that no compiler takes."""
    tree, n_batch = TokenTree.chain(depth), 8
    chosen, tokens = torch.randint(0, 2, (n_batch * len(tree),)), torch.randint(0, 2, (n_batch, depth))
    case = [chosen, tokens, torch.full((n_batch,), depth), tree.topology(chosen.device), tree.tensors(chosen.device)[0]]
    case.append(torch.arange(n_batch + 1) * len(tree))
    compiled = torch.compile(verify_greedy_reference, fullgraph=True, dynamic=True)
    for got, expected in zip(compiled(*case, depth), verify_greedy_reference(*case, depth), strict=True):
        assert torch.equal(got, expected)
