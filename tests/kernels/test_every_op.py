"""The operator library: every op is a well-formed custom op, whatever path it takes, and takes the path it should."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ambient_world import SETTINGS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import specdec.kernels
from specdec.engine.tree import TokenTree
from specdec.kernels.cache.kv_cache import cache_table
from specdec.kernels.library import INTERPRETED, OPS, runs_triton

pytestmark = pytest.mark.kernels

for _module in pkgutil.walk_packages(specdec.kernels.__path__, "specdec.kernels."):
    importlib.import_module(_module.name)

_ALIVE: list[Any] = []  # caches that ops know by their addresses only


def _ragged_attention(device: torch.device) -> tuple[Any, ...]:
    keys, values = (torch.randn(2, 3, 40, 24, device=device) for _ in "kv")
    _ALIVE.append((keys, values))
    bits, depths = TokenTree((-1, 0, 0, 1, 2)).tensors(device)
    lengths, node = torch.tensor([0, 7, 30], device=device), torch.arange(5, device=device).repeat(3)
    starts = torch.arange(4, device=device) * 5
    slot = torch.arange(3, device=device).repeat_interleave(5) * 40 + lengths.repeat_interleave(5) + node
    new = [torch.randn(15, heads, 24, device=device) for heads in (4, 2, 2)]
    table = cache_table([(keys, values)])[0]
    return *new, table, slot, starts, lengths, node, bits, depths, 40, 4, 0.3, 2.0


def _tree_attention(device: torch.device) -> tuple[Any, ...]:
    bits, depths = TokenTree((-1, 0, 0)).tensors(device)
    caches = [torch.randn(2, 2, 9, 16, device=device) for _ in "kv"]
    where = [torch.tensor(x, device=device) for x in ([0, 3, 6], [4, 0], [0, 1, 2, 0, 1, 2])]
    return torch.randn(6, 4, 16, device=device), *caches, *where, bits[None], depths[None], 3, 0.3, 2.0, None


def _commit(device: torch.device) -> tuple[Any, ...]:
    caches = [(torch.randn(2, 2, 8, 4, device=device), torch.randn(2, 2, 8, 4, device=device))]
    _ALIVE.append(caches)
    path = torch.tensor([[0, 2], [0, 1]], device=device)
    return (
        cache_table(caches),
        *torch.tensor([[1, 3]], device=device),
        path,
        *torch.tensor([[2, 1]], device=device),
        2,
        16,
        16,
    )


def _laws(rows: int, device: torch.device) -> tuple[Tensor, ...]:
    logits = torch.randn(rows, 7, device=device)
    zeros = torch.zeros(rows, device=device)
    return logits, torch.tensor([1.0, 1.0, 0.0], device=device), logits.logsumexp(-1), zeros - torch.inf, zeros.long()


def _verify_tree(device: torch.device) -> tuple[Any, ...]:
    """Two samples of three nodes and one, packed."""
    topology, places = TokenTree((-1, 0, 1)).topology(device), torch.tensor([[0, 1], [0, -1]], device=device)
    ids = torch.tensor([[[0, 3], [4, 1]]] * 2, device=device)
    n_nodes, starts = torch.tensor([3, 1], device=device), torch.tensor([0, 3, 4], device=device)
    probs, n_hubs = torch.full_like(ids, 0.5, dtype=torch.float32), torch.zeros_like(ids[..., 0])
    return *_laws(4, device), topology, places, n_nodes, ids, probs, n_hubs, n_nodes, n_nodes, starts, 2, True


def _verify_greedy(device: torch.device) -> tuple[Any, ...]:
    tree = TokenTree((-1, 0, 0))
    chosen, tokens, n_nodes, starts = (torch.tensor(x, device=device) for x in ([1, 2, 3], [[1, 0]], [3], [0, 3]))
    return chosen, tokens, n_nodes, tree.topology(device), tree.tensors(device)[0], starts, tree.depth


def _keys(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.arange(9, device=device).view(3, 3) - 1)


def _draw_children(device: torch.device) -> tuple[Any, ...]:
    ids, probs = torch.arange(15, device=device).view(3, 5), torch.rand(3, 5, device=device)
    n_hubs, counts = (torch.tensor(x, device=device) for x in ([0, -1, 1], [2, 0, 2]))
    return ids, probs, n_hubs, counts, *_keys(device), 0, 2, False


def _draw_row(device: torch.device) -> tuple[Any, ...]:
    row, ids = torch.tensor([3, 0, 1], device=device), torch.tensor([[0, 5], [-1, 2], [-1, -1]], device=device)
    return *_laws(4, device), row, ids, torch.rand(3, 2, device=device), *_keys(device), 2, False


def _half(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float16, device=device)


CASES: dict[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "uniform": lambda d: (*_keys(d), 1),
    "draw": lambda d: (torch.rand(3, 7, device=d), *_keys(d), 1, False),
    "draw_children": _draw_children,
    "draw_row": _draw_row,
    "best_token": lambda d: (torch.randn(3, 5000, device=d),),
    "top_support": lambda d: (*_laws(3, d)[:2], 0, 4),
    "row_law": lambda d: (*_laws(3, d)[:2], 3),
    "verify_greedy": _verify_greedy,
    "verify_tree": _verify_tree,
    "ancestor_words": lambda d: (torch.tensor([[-1, 0, 0, 1]], device=d),),
    "kv_append_": lambda d: (
        *(torch.randn(2, 3, 8, 4, device=d) for _ in "kv"), *(torch.randn(2, 3, 4, device=d) for _ in "kv"),
        torch.tensor([0, 9, 5], device=d),
    ),
    "kv_commit_": _commit,
    "skinny_linear": lambda d: (torch.randn(1, 3, 17), torch.randn(5, 17)),
    "joined_linear": lambda d: (_half(d, 3, 17), [_half(d, 5, 17), _half(d, 4, 17)], [_half(d, 5), _half(d, 4)]),
    "gated_linear": lambda d: (_half(d, 3, 17), _half(d, 5, 17), _half(d, 5, 17)),
    "tree_attention": _tree_attention,
    "ragged_attention": _ragged_attention,
    "masked_attention": lambda d: (
        torch.randn(2, 3, 4, 8, device=d).transpose(1, 2), *(torch.randn(2, 2, 9, 8, device=d) for _ in "kv"),
        torch.rand(2, 1, 3, 9, device=d) > 0.3, 0.4,
    ),
}  # fmt: skip


def test_every_registered_op_is_checked_here() -> None:
    names = {n.removeprefix("specdec::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("specdec::")}
    assert names == set(OPS) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, device: torch.device) -> None:
    op = OPS[name]
    at = device if op.launcher is not None else torch.device("cpu")
    torch.manual_seed(0)
    torch.library.opcheck(op.call.op, CASES[name](at))


@pytest.mark.parametrize("setting", ["float64", "float16", "meta", "deterministic"])
@pytest.mark.parametrize("name", CASES)
def test_an_op_does_not_depend_on_torchs_settings(name: str, setting: str, device: torch.device) -> None:
    """Neither what it gives, nor what its fake says of that."""
    op = OPS[name]
    at = device if op.launcher is not None else torch.device("cpu")
    results = []
    for under in (nullcontext, SETTINGS[setting]):
        torch.manual_seed(0)
        arguments = CASES[name](at)
        with under():
            out = op.call(*arguments)
            with FakeTensorMode() as mode:
                fakes = op.call.op(*tree_map_only(Tensor, mode.from_tensor, arguments))
        outs, fakes = (x if isinstance(x, tuple | list) else (x,) for x in (out, fakes))
        look, fake = ([x is None or (x.shape, x.dtype, x.device) for x in each] for each in (outs, fakes))
        assert look == fake
        # What is written in place counts, and addresses in tables do not.
        written = () if name == "kv_commit_" or "(a!)" not in op.schema else arguments[:2]
        results.append((look, [x for x in (*outs, *written) if x is not None]))
    (plain_look, plain), (look, found) = results
    assert plain_look == look
    assert all(map(torch.equal, plain, found))


@pytest.mark.parametrize("name", CASES)
def test_an_op_takes_the_path_it_says(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run where they should and nowhere else: with kernels that can't start, ops fail or don't."""
    op = OPS[name]

    class Started(Exception):
        pass

    def start(*args: Any, **kwargs: Any) -> None:
        raise Started

    arguments = CASES[name](device if op.launcher is not None else torch.device("cpu"))  # some take kernels to make
    for module in [m for n, m in sys.modules.items() if n.startswith("specdec.kernels.")]:
        for key, value in list(vars(module).items()):
            if key.endswith("_kernel") and hasattr(value, "run"):
                monkeypatch.setattr(value, "run", start)
                monkeypatch.setattr(type(value), "__getitem__", lambda self, grid: start)
    if op.launcher is not None and runs_triton(torch.empty(0, device=device)):
        with pytest.raises(Started):
            op.call(*arguments)
        assert op.path(device.type).startswith("Triton")
    else:
        op.call(*arguments)
        assert not op.path("cpu").startswith("Triton")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter by itself")
def test_info_names_the_paths() -> None:
    def info(**more: str) -> str:
        command = [sys.executable, "-m", "specdec", "info", "--verbose"]
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert "interpreted" not in info()
    assert info(TRITON_INTERPRET="1").count("Triton kernel, interpreted") == sum(
        op.launcher is not None for op in OPS.values()
    )
