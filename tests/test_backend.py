"""`torch.compile(backend="specdec")`: each pass alone, a plain transformers loop, and what is left to Inductor."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import PAST
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, PreTrainedModel, StaticCache

from specdec.graphs.backend import specdec
from specdec.graphs.passes import PASSES
from specdec.kernels.linear import skinny_linear

Tiny = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def run(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, list[str]]:
    """What the function gives compiled with this backend, and which ops of ours its graphs call."""
    called: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = specdec(gm, inputs, options=options)
        called.extend(
            node.target._schema.name
            for m in gm.modules() if isinstance(m, torch.fx.GraphModule)
            for node in m.graph.nodes if getattr(node.target, "namespace", "") == "specdec"
        )  # fmt: skip
        return compiled

    return torch.compile(function, backend=backend, fullgraph=True)(*args), called


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """As transformers does it: keys repeated for every query head."""
    n_batch, n_groups, n_slots, dim = k.shape
    group = q.shape[1] // n_groups
    k, v = (
        x[:, :, None, :, :].expand(n_batch, n_groups, group, n_slots, dim).reshape(n_batch, -1, n_slots, dim)
        for x in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)


def inputs(n_queries: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q = torch.randn(2, n_queries, 4, 16, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, 40, 16, dtype=dtype) for _ in "kv")
    return q, k, v, (torch.arange(40)[None, None, None] < 20).expand(2, 1, n_queries, -1)


@pytest.mark.parametrize("n_queries", [1, 5])
def test_attention_reads_the_keys_before_they_are_repeated(n_queries: int) -> None:
    args = inputs(n_queries)
    out, called = run(attend, *args, passes=["attention_over_a_padded_cache"])
    torch.testing.assert_close(out, attend(*args))
    assert called == ["specdec::masked_attention"]


def test_a_masked_out_cache_is_not_read() -> None:
    """The replaced attention skips what no query sees: nonsense there does not show, as it would in PyTorch's own."""
    q, k, v, mask = inputs()
    expected = attend(q, k, v, mask)
    v[:, :, 30:] = torch.nan
    assert attend(q, k, v, mask).isnan().any()
    out, _ = run(attend, q, k, v, mask)
    torch.testing.assert_close(out, expected)


def test_the_writes_to_a_cache_stay() -> None:
    """Nothing but the replaced call and its repeated keys leaves the graph: not the in-place writes before it."""

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, new: Tensor, slot: Tensor) -> Tensor:
        k.index_copy_(2, slot, new)
        v.index_copy_(2, slot, 2 * new)
        return attend(q, k, v, mask)

    args, others = (inputs() for _ in range(2))
    new, slot = torch.randn(2, 2, 1, 16), torch.tensor([19])
    expected = step(*args, new, slot)
    out, called = run(step, *others, new, slot)
    assert called
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(others, args, strict=True):
        assert torch.equal(ours, theirs)


def test_keys_used_elsewhere_are_still_repeated() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        repeated = k[:, :, None, :, :].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16)
        return F.scaled_dot_product_attention(q, repeated, repeated, mask), repeated * 2

    args = inputs()
    out, called = run(both, *args)
    assert called == ["specdec::masked_attention"]
    torch.testing.assert_close(out, both(*args))


def test_another_reshape_is_not_taken_for_repeated_keys() -> None:
    """Heads repeated in another order mean other keys."""

    def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (x[:, None].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask)

    args = inputs()
    out, called = run(tiled, *args)
    assert called == ["specdec::masked_attention"]
    torch.testing.assert_close(out, tiled(*args))
    assert not torch.allclose(out, attend(*args))


def test_keys_and_values_repeated_in_different_orders_stay_repeated() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k = k[:, :, None, :, :].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16)
        return F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, 1), mask)

    args = inputs()
    out, called = run(mixed, *args)
    assert called == ["specdec::masked_attention"]
    torch.testing.assert_close(out, mixed(*args))


def test_keys_that_changed_since_they_were_repeated_stay_repeated() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        k = k.clone()
        repeated = k[:, :, None, :, :].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16)
        v = v[:, :, None, :, :].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16)
        k.mul_(3)
        return F.scaled_dot_product_attention(q, repeated, v, mask), k

    args = inputs()
    out, called = run(changed, *args)
    assert called
    torch.testing.assert_close(out, changed(*args))


def test_keys_that_are_their_own_values() -> None:
    def tied(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        repeated = k[:, :, None, :, :].expand(2, 2, 2, 40, 16).reshape(2, 4, 40, 16)
        return F.scaled_dot_product_attention(q, repeated, repeated, mask)

    q, k, _, mask = inputs()
    out, called = run(tied, q, k, mask)
    assert called == ["specdec::masked_attention"]
    torch.testing.assert_close(out, tied(q, k, mask))


@pytest.mark.parametrize(
    "shapes",
    [((2, 4, 1, 16), (1, 4, 40, 16), (1, 4, 40, 16)), ((2, 4, 1, 16), (2, 4, 40, 16), (2, 1, 40, 16)),
     ((1, 4, 1, 16), (2, 4, 40, 16), (2, 4, 40, 16)), ((2, 1, 1, 16), (2, 4, 40, 16), (2, 4, 40, 16))],
    ids=["one text of keys", "one head of values", "one text of queries", "one head of queries"],
)  # fmt: skip
def test_what_only_broadcasting_fits_together_is_left_alone(shapes: tuple[tuple[int, ...], ...]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for shape in shapes)
    mask = torch.rand(2, 1, 1, 40) > 0.3
    out, called = run(F.scaled_dot_product_attention, q, k, v, mask)
    assert not called
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


def test_what_comes_after_finds_the_layout_it_was_traced_with() -> None:
    """Values of another head dim take PyTorch's other path, whose result is laid out otherwise."""

    def viewed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).view(8, 3, 24)

    q, k, _, mask = inputs(3)
    v = torch.randn(2, 2, 40, 24)
    out, called = run(viewed, q, k, v, mask)
    assert called
    torch.testing.assert_close(out, viewed(q, k, v, mask))


def test_autocast_is_left_alone() -> None:
    args = inputs()
    x, weight = torch.randn(5, 640), torch.randn(512, 640)
    with torch.autocast("cpu", torch.bfloat16):
        for function, given in ((attend, args), (F.linear, (x, weight))):
            out, called = run(function, *given)
            expected = function(*given)
            assert not called
            assert out.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(out, expected)


def test_gradients_enabled_inside_are_kept() -> None:
    weight = torch.randn(512, 640)

    def function(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return F.linear(x, weight).sum()

    x = torch.randn(5, 640, requires_grad=True)
    out, called = run(function, x)
    out.backward()
    assert not called
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["weight", "all", "bias"])
def test_linear_takes_its_arguments_by_name(form: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 640), torch.randn(512, 640), torch.randn(512)
    calls: dict[str, Callable[[], Tensor]] = {
        "weight": lambda: F.linear(x, weight=weight), "all": lambda: F.linear(input=x, weight=weight, bias=bias),
        "bias": lambda: F.linear(x, weight, bias=bias),
    }  # fmt: skip
    out, called = run(calls[form])
    assert called == ["specdec::skinny_linear"]
    torch.testing.assert_close(out, calls[form](), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["weights", "heads"])
def test_symbolic_sizes_stay_symbolic(what: str) -> None:
    """As many graphs as plain Inductor needs."""
    counts = []
    for backend in (specdec, "eager"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        for n in (3, 5, 7):
            if what == "weights":
                function, args = F.linear, (torch.randn(4, 64), torch.randn(200 * n * n, 64))
            else:
                k = torch.randn(2, n, 40, 16)
                function = F.scaled_dot_product_attention
                args = (torch.randn(2, n, 1, 16), k, k, torch.rand(2, 1, 1, 40) > 0.3)
            torch.compile(function, backend=counter, fullgraph=True, dynamic=True)(*args)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no mask", "no mask"),
        ("causal", "no mask"),
        ("queries", "33 queries"),
        ("half", "no kernel for torch.bfloat16"),
    ],
)
def test_other_attention_is_left_alone(case: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v, mask = inputs(33 if case == "queries" else 1, torch.bfloat16 if case == "half" else torch.float32)
    more = {"is_causal": True} if case == "causal" else {}

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, k, v, None if case in ("no mask", "causal") else mask, **more)

    with caplog.at_level(logging.INFO, logger="specdec"):
        out, called = run(function, q, k, v, mask)
    assert not called
    torch.testing.assert_close(out, function(q, k, v, mask))
    assert reason in caplog.text


def test_queries_of_any_number_are_left_alone() -> None:
    """A pass that looked at a symbolic size would make a constant of it, and compile again for the next."""
    counter = CompileCounterWithBackend(specdec)
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for n_queries in (3, 5, 7):  # not 2, which is the batch
        args = inputs(n_queries)
        torch.testing.assert_close(compiled(*args), attend(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("n_rows", [1, 2, 3, 48, 49])
@pytest.mark.parametrize("bias", [None, torch.arange(512.0)])
def test_linear_takes_any_number_of_rows(n_rows: int, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_linear, "max_rows", lambda: 48)
    torch.manual_seed(0)
    weight = torch.randn(512, 640)
    x = torch.randn(1, n_rows, 640)
    out, called = run(F.linear, x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    assert called == ["specdec::skinny_linear"] * (n_rows <= 48)


def test_one_linear_for_all_numbers_of_rows() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 640)
    counter = CompileCounterWithBackend(specdec)
    compiled = torch.compile(F.linear, backend=counter, fullgraph=True)
    for n_rows in (4, 5, 2, 16, 17, 300):
        x = torch.randn(n_rows, 640)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_small_weights_are_left_alone() -> None:
    x, weight = torch.randn(6, 64), torch.randn(128, 64)
    assert run(F.linear, x, weight)[1] == []


def test_what_may_be_differentiated_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v, mask = inputs()
    with torch.enable_grad(), caplog.at_level(logging.INFO, logger="specdec"):
        q.requires_grad_()
        out, called = run(attend, q, k, v, mask)
        out.sum().backward()
        assert q.grad is not None
        ours, q.grad = q.grad, None
        attend(q, k, v, mask).sum().backward()
        torch.testing.assert_close(ours, q.grad)
    assert not called
    assert "differentiated" in caplog.text


def test_unknown_options_are_named() -> None:
    with pytest.raises(BackendCompilerFailed, match="neither specdec nor Inductor has an option 'max_autotun'"):
        run(torch.sin, torch.ones(3), max_autotun=True)
    with pytest.raises(BackendCompilerFailed, match="no pass 'atention'; it has attention_over_a_padded_cache"):
        run(torch.sin, torch.ones(3), passes=["atention"])
    out, called = run(attend, *inputs(), passes=[], max_autotune=False)
    assert not called
    torch.testing.assert_close(out, attend(*inputs()))


def static_loop(forward: Callable[..., Any], model: PreTrainedModel, ids: Tensor, n_new: int) -> Tensor:
    """A user's own greedy loop over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=96)
    logits = model(ids, **{PAST: cache}).logits
    tokens = []
    for i in range(n_new):
        tokens.append(logits[:, -1:].argmax(-1))
        position = torch.full_like(tokens[-1], ids.shape[1] + i)
        logits = forward(input_ids=tokens[-1], position_ids=position, **{PAST: cache}).logits
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_loop_of_ones_own_gives_the_same_tokens(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    backend = CompileCounterWithBackend(specdec)
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert torch.equal(static_loop(compiled, model, ids, 24), static_loop(model.forward, model, ids, 24))
    for graph in backend.graphs:
        replaced = [n for n in graph.graph.nodes if n.target is torch.ops.specdec.masked_attention.default]
        assert len(replaced) == model.config.num_hidden_layers
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    static_loop(torch.compile(model.forward, backend=counter, fullgraph=True), model, ids, 24)
    assert backend.frame_count == counter.frame_count


def test_generate_with_a_static_cache_takes_it_by_name(
    fresh: Tiny, prompts: Callable[..., dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """transformers compiles its own loop with the backend of `compile_config`."""
    model = fresh("llama")
    given = prompts([7, 4])
    config = CompileConfig(backend="specdec")
    config._compile_all_devices = True
    expected = model.generate(**given, max_new_tokens=12)
    with caplog.at_level(logging.INFO, logger="specdec"):
        out = model.generate(**given, max_new_tokens=12, cache_implementation="static", compile_config=config)
    assert torch.equal(out, expected)
    assert f"attention_over_a_padded_cache: {model.config.num_hidden_layers} replaced" in caplog.text


def test_a_linear_layer_that_reads_another() -> None:
    """As a weight in two factors does, with and without a bias between."""
    torch.manual_seed(0)
    for bias in (False, True):
        two = torch.nn.Sequential(torch.nn.Linear(512, 512, bias), torch.nn.Linear(512, 512, bias)).requires_grad_(
            False
        )
        x = torch.randn(3, 512)
        torch.testing.assert_close(torch.compile(two, backend="specdec", fullgraph=True)(x), two(x))
        torch._dynamo.reset()


def test_the_name_is_found_without_importing_specdec() -> None:
    code = """
import sys, torch
assert "specdec" not in sys.modules
assert "specdec" in torch._dynamo.list_backends()
x = torch.randn(5)
assert torch.allclose(torch.compile(lambda x: (x * 2).sin(), backend="specdec")(x), (x * 2).sin())
assert "specdec.graphs.backend" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_step_uses_every_pass_it_can(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """specdec.compile() goes through the same backend."""
    import specdec as library

    counts = dict.fromkeys(PASSES, 0)
    for name, rewrite in PASSES.items():

        def counted(graph: torch.fx.Graph, name: str = name, rewrite: Any = rewrite) -> int:
            n_replaced = rewrite(graph)
            counts[name] += n_replaced
            return n_replaced

        monkeypatch.setitem(PASSES, name, counted)
    target = tiny("llama", hidden_size=256, intermediate_size=1024, head_dim=64)
    given = {"input_ids": torch.arange(1, 9)[None], "max_new_tokens": 12}
    out = library.compile(target, "ngram").generate(**given)
    assert torch.equal(out, target.generate(**given))
    assert counts["linear_of_few_rows"] > 0
    assert counts["attention_over_a_padded_cache"] == 0  # its attention is the ragged one already
