"""ModelView: a private copy of a model's modules over the same weights, set up to run flat ragged tokens.

The user's model is never touched: its configuration, attention implementation, hooks and forwards stay as they are,
and any number of views of one model can run side by side. Only the module tree is copied; parameters and buffers are
shared.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec import attention
from specdec.cache import RaggedCache
from specdec.kernels.cpu import has_kernels
from specdec.kernels.library import INTERPRETED
from specdec.nodes import Nodes

# Families whose ragged forward is tested token by token against transformers.
SUPPORTED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"})


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(chain(model.parameters(), model.buffers()))


def _trait(tensor: Tensor) -> tuple[object, ...]:
    """What compiled and recorded steps rely on: they know a weight's shape, or even its address."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.data_ptr()


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of the decoder: the modules of its longest list."""
    lists = [list(m) for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def _as_region(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that compiles once for all layers alike; eager calls go straight through."""
    region = torch.compiler.nested_compile_region(forward)

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        return (region if torch.compiler.is_compiling() else forward)(*args, **kwargs)

    return layer_forward


class ModelView:
    """A decoder-only model running flat tokens over a `RaggedCache`.

    Args:
        model: the user's model; its weights are shared, its modules are copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        attention.install()
        self.source = model
        self.weights = _tensors(model)
        self._traits = [_trait(t) for t in self.weights]
        self.module: PreTrainedModel = copy.deepcopy(model, {id(t): t for t in self.weights})
        self.module.config._attn_implementation = attention.NAME
        for layer in _decoder_layers(self.module):
            vars(layer)["forward"] = types.MethodType(_as_region(type(layer).forward), layer)
        self.cache = RaggedCache(has_kernels(next(model.parameters())) and not INTERPRETED)
        self.module.config.specdec_cache = self.cache
        config = model.config
        # Drafts may reach past a table of learned positions near the end of a text; they are never accepted there.
        self._last_position = config.max_position_embeddings - 1 if config.model_type == "gpt2" else None
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._layer_shapes = [(n_groups, head_dim)] * config.num_hidden_layers

    @property
    def is_current(self) -> bool:
        """Whether the user's model still holds the very weights this view was made from, as they were then.

        Their values may change freely; compiled steps rely on the rest.
        """
        now = _tensors(self.source)
        return (
            len(now) == len(self.weights)
            and all(a is b for a, b in zip(now, self.weights, strict=True))
            and [_trait(t) for t in now] == self._traits
        )

    @property
    def device(self) -> torch.device:
        return self.module.device

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """An empty cache for `n_batch` samples of `n_slots` slots each."""
        like = torch.empty(0, dtype=self.module.dtype, device=self.device)
        self.cache.allocate(self._layer_shapes, n_batch, n_slots, like)

    def admit(self, row: int, text: Tensor) -> None:
        """Write the keys and values of another text, [length] int64, in place of a row's own."""
        self.cache.clear(row)
        n_batch = self.cache.layers[0].keys.shape[1]
        self.prefill([text if i == row else text[:0] for i in range(n_batch)])

    def forward(self, tokens: Tensor, nodes: Nodes, rows: Tensor | int = 0) -> Tensor:
        """Logits of the flat tokens; their keys and values are written to the cache.

        Args:
            tokens: [T] int64. nodes: where they belong. rows: [M] int64, the tokens whose logits are wanted, or 0
                for all.

        Returns:
            [T or M, V] in the model's dtype.
        """
        self.cache.nodes = nodes
        out = self.module(
            input_ids=tokens[None],
            position_ids=self._positions(nodes),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=rows,
        )
        self.cache.nodes = None
        return out.logits[0]

    def _positions(self, nodes: Nodes) -> Tensor:
        position = nodes.position if self._last_position is None else nodes.position.clamp(max=self._last_position)
        return position[None]

    def prefill(self, texts: list[Tensor], chunk: int = 1024) -> None:
        """Write the keys and values of the texts, packed without padding, `chunk` tokens a sample at a time.

        Args:
            texts: one [length] int64 tensor a sample, on any device; an empty one writes nothing.
        """
        decoder = self.module.get_decoder()
        done = [0] * len(texts)
        while any(d < len(t) for d, t in zip(done, texts, strict=True)):
            pieces = [t[d : d + chunk] for d, t in zip(done, texts, strict=True)]
            counts = [len(p) for p in pieces]
            device = self.device
            nodes = Nodes.packed(
                torch.tensor(done, device=device),
                torch.tensor(counts, device=device),
                torch.arange(sum(counts), device=device),
                max(counts),
                self.cache.n_slots,
            )
            self.cache.nodes = nodes
            tokens = torch.cat(pieces).to(device)
            decoder(
                input_ids=tokens[None],
                position_ids=self._positions(nodes),
                past_key_values=self.cache,
                use_cache=True,
            )
            self.cache.nodes = None
            done = [d + c for d, c in zip(done, counts, strict=True)]
