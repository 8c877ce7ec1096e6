"""`torch.compile(model, backend="specdec")`: Inductor, after rewriting what decoding does badly in plain PyTorch.

Dynamo hands over a graph of torch calls. The passes of `specdec.graphs.passes` replace some of them by ops of this
library, and Inductor compiles the rest. A graph nothing applies to reaches Inductor untouched; the log
(`logging.getLogger("specdec")`, level INFO) says what was replaced, and why something was not.

The name is found through the entry point group `torch_dynamo_backends`: nobody has to import specdec for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from specdec.graphs.passes import PASSES

log = logging.getLogger("specdec")


def specdec(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: what `torch.compile(..., backend="specdec", options=..., mode=...)` calls for each graph.

    Args:
        options: `"passes"`, names of the passes to run (all of `PASSES` unless given), and Inductor's own options.
        mode: as for Inductor.

    Raises:
        ValueError: an option that neither this backend nor Inductor knows.
    """
    from torch._inductor.compile_fx import compile_fx

    names, patches = _parse(options or {}, mode)
    if reason := _unsupported(example_inputs):
        log.info("graph left to Inductor as it is: %s", reason)
    else:
        for name in names:
            n_replaced = sum(PASSES[name](m.graph) for m in gm.modules() if isinstance(m, fx.GraphModule))
            log.info("%s: %d replaced", name, n_replaced)
        gm.recompile()
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def _parse(options: Mapping[str, Any], mode: str | None) -> tuple[Sequence[str], dict[str, Any]]:
    """The passes to run and the settings for Inductor."""
    names = options.get("passes", tuple(PASSES))
    if unknown := [name for name in names if name not in PASSES]:
        raise ValueError(f"specdec has no pass {unknown[0]!r}; it has {', '.join(PASSES)}")
    theirs = {name.replace("-", "_"): value for name, value in options.items() if name != "passes"}
    known = torch._inductor.list_options()
    if strangers := [name for name in theirs if name not in known]:
        raise ValueError(f"neither specdec nor Inductor has an option {strangers[0]!r}; specdec's own is 'passes'")
    # A decode step is many small kernels: on a GPU one CUDA graph replays them, unless mode or options say otherwise.
    default = {"triton.cudagraphs": True} if torch.cuda.is_available() else {}
    return names, {**(torch._inductor.list_mode_options(mode) if mode else default), **theirs}


def _unsupported(example_inputs: Sequence[Any]) -> str | None:
    """Why a graph is none of ours."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        return "it may be differentiated; decode under torch.no_grad()"
    return None
