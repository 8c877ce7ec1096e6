"""`torch.compile(backend="specdec")` computes linear layers of one input at once, where kernels run, on few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.graphs.backend import specdec
from specdec.kernels.library import runs_triton

pytestmark = pytest.mark.kernels
HERE = runs_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
"""Whether kernels run; where they don't, nothing is to be replaced, and the same is to come out."""
JOINED, GATED = "specdec::joined_linear", "specdec::gated_linear"


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def layers(device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(n, 32) / 6).to(device, torch.float16) for n in (24, 8, 8, 40, 40)]


def _run(function: Callable[..., Any], *args: Any, is_dynamic: bool = False) -> list[str]:
    """Which ops of ours the function calls compiled; it gives what it gives by itself, and leaves the same behind."""
    called: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled = specdec(gm, inputs)
        names = [getattr(node.target, "_schema", None) for node in gm.graph.nodes]
        called.extend(schema.name for schema in names if schema and schema.name.startswith("specdec::"))
        return compiled

    ours, theirs = ([x.clone() if isinstance(x, Tensor) else x for x in args] for _ in range(2))
    if is_dynamic:
        torch._dynamo.mark_dynamic(ours[0], 1)
    out = torch.compile(function, backend=backend, fullgraph=True)(*ours)
    torch.testing.assert_close((out, ours), (function(*theirs), theirs), rtol=4e-3, atol=4e-3)
    return called


def _x(device: torch.device, n_rows: int = 3) -> Tensor:
    return torch.randn(1, n_rows, 32, generator=torch.Generator().manual_seed(n_rows)).to(device, torch.float16)


def _layer(x: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return F.linear(x, q), F.linear(x, k), F.linear(x, v), F.silu(F.linear(y, gate)) * F.linear(y, up)


@pytest.mark.parametrize(("n_rows", "is_dynamic"), [(1, False), (64, False), (3, True), (70, True)])
def test_few_rows_are_computed_at_once(
    n_rows: int, is_dynamic: bool, layers: list[Tensor], device: torch.device
) -> None:
    assert _run(_layer, _x(device, n_rows), *layers, is_dynamic=is_dynamic) == [JOINED, GATED] * HERE


def test_many_rows_other_dtypes_and_a_switch(
    layers: list[Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(_layer, _x(device, 65), *layers) == []
    args = [x.float() for x in (_x(device), *layers)]
    torch._dynamo.reset()
    assert not {JOINED, GATED} & set(_run(_layer, *args))
    torch._dynamo.reset()
    monkeypatch.setenv("SPECDEC_JOINED_LINEAR", "0")
    assert _run(_layer, _x(device), *layers) == []


def test_what_is_differentiated_stays(layers: list[Tensor], device: torch.device) -> None:
    with torch.enable_grad():
        assert _run(_layer, _x(device), *[x.requires_grad_() for x in layers]) == []


GATES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "in another order": (lambda x, gate, up, row, bias: F.linear(x, up) * F.silu(F.linear(x, gate)), [GATED]),
    "in place": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate), inplace=True) * F.linear(x, up), [GATED]),
    "another activation": (lambda x, gate, up, row, bias: F.gelu(F.linear(x, gate)) * F.linear(x, up), [JOINED]),
    "squared": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate)) * F.silu(F.linear(x, gate)), [JOINED]),
    "of itself": (lambda x, gate, up, row, bias: (h := F.silu(F.linear(x, gate))) * h, []),
    "used twice": (
        lambda x, gate, up, row, bias: ((h := F.silu(F.linear(x, gate))) * F.linear(x, up), h + 1),
        [JOINED],
    ),
    "up used twice": (
        lambda x, gate, up, row, bias: (F.silu(F.linear(x, gate)) * (u := F.linear(x, up)), u + 1),
        [JOINED],
    ),
    "two inputs": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate)) * F.linear(x + 1, up), []),
    "one column": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate)) * F.linear(x, row), [JOINED]),
    "a bias": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate, bias)) * F.linear(x, up), []),
    "biases": (lambda x, gate, up, row, bias: F.silu(F.linear(x, gate, bias)) * F.linear(x, up, bias), [JOINED]),
}


@pytest.mark.parametrize("name", GATES)
def test_what_is_a_gated_unit(name: str, layers: list[Tensor], device: torch.device) -> None:
    function, expected = GATES[name]
    row, bias = (torch.randn(shape).to(device, torch.float16) for shape in ((1, 32), (40,)))
    assert _run(function, _x(device), *layers[3:], row, bias) == expected * HERE


def test_biases_go_with_biases(layers: list[Tensor], device: torch.device) -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, q, b), F.linear(x, k), F.linear(x, v, c), F.linear(x, k + 1)

    biases = [torch.randn(n).to(device, torch.float16) for n in (24, 8)]
    assert _run(function, _x(device), *layers[:3], *biases) == [JOINED] * HERE


def _add(x: Tensor) -> None:
    x += 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "operator": _add,
    "method": lambda x: x.add_(1),
    "part": lambda x: x[:, 1:].zero_(),
    "assignment": lambda x: x.__setitem__((0, 0), 0.0),
    "out": lambda x: torch.add(x, 1, out=x),
    "activation": lambda x: F.relu(x, inplace=True),
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_an_input_that_is_written_between_is_read_twice(name: str, layers: list[Tensor], device: torch.device) -> None:
    def joined(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        first = F.linear(x, q)
        WRITES[name](x)
        return first, F.linear(x, k)

    def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        first = F.silu(F.linear(x, gate))
        WRITES[name](x)
        return first * F.linear(x, up)

    assert _run(joined, _x(device), *layers[:2]) == []
    assert _run(gated, _x(device), *layers[3:]) == []
