"""Token trees: what is one, and how a shallower one relates to a deeper one."""

from __future__ import annotations

import pytest
import torch

from specdec.tree import TokenTree


def test_a_shallower_chain_is_a_prefix() -> None:
    long, short = (TokenTree.chain(n).tensors(torch.device("cpu")) for n in (99, 40))
    assert torch.equal(long[0][:41, :1], short[0])
    assert torch.equal(long[1][:41], short[1])


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 1, 0), (-1, 2, 0)])
def test_what_is_no_level_order_tree_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="node"):
        TokenTree(parents)
