"""The `specdec` operator library: one `register` call per op.

An op has a hand-written schema, a fake (shapes only), a CPU implementation and a CUDA implementation. Under
`torch.compile` on a CPU the implementation is inlined so that Inductor can fuse through it; everywhere else the call
goes through the dispatcher, which is what `opcheck`, fake tensors and CUDA graphs see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("specdec", "FRAGMENT")


def register(schema: str, *, cpu: Callable, cuda: Callable, fake: Callable, inline: bool = True) -> Callable[..., Any]:
    """Define the op `specdec::<schema>` and return the function the rest of the library calls.

    Args:
        schema: for example `"draw(Tensor probs, Tensor seed) -> Tensor"`; mutated arguments are marked `Tensor(a!)`.
        cpu: implementation in plain PyTorch operations, traceable by Dynamo.
        cuda: implementation for CUDA tensors.
        fake: shapes and dtypes of the result, given fake tensors.
        inline: False keeps the op opaque to Inductor on a CPU too, for implementations that are not PyTorch code.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"specdec::{name}", fake, lib=_library)
    op = getattr(torch.ops.specdec, name).default

    def call(*args: Any) -> Any:
        return cpu(*args) if inline and torch.compiler.is_compiling() and args[0].is_cpu else op(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = cpu.__doc__
    call.op = op  # type: ignore[attr-defined]
    return call
