"""ModelView: a private copy of a model's modules over the same weights, set up to run flat ragged tokens.

The user's model is never touched: its configuration, attention implementation, hooks and forwards stay as they are,
and any number of views of one model can run side by side. Only the module tree is copied (see `specdec.hf.twin`);
parameters, buffers and all else are shared.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from specdec.engine.packing import Nodes
from specdec.engine.roles import Output
from specdec.engine.tree import TokenTree
from specdec.errors import Unsupported
from specdec.graphs.compiled import as_region
from specdec.hf import attention, names
from specdec.hf.adaptive import AdaptiveTokens
from specdec.hf.cache import RaggedCache, Way
from specdec.hf.proof import prove
from specdec.hf.twin import Look
from specdec.kernels.attention.ragged_attention import can_run

if TYPE_CHECKING:
    from specdec.graphs.captured import CapturedSteps

RECORDED = (256, 64, 16)
"""Where steps are recorded, writing so many tokens of texts is; more keep a device busy for longer than it takes to
start their kernels."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of the decoder."""
    return [module for module in model.get_decoder().modules() if isinstance(module, names.DecoderLayer)]


def learned_positions(config: Any) -> int | None:
    """How many positions a model has a table for; None with a rope, which goes on."""
    config = config.get_text_config()
    return None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)


def _noting(forward: Callable[..., Any], cache: RaggedCache, index: int) -> Callable[..., Any]:
    """A layer's forward that also puts what comes out, [1, T, H], among the features of the forward in flight."""

    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        assert cache.features is not None
        cache.features[index] = out[0] if isinstance(out, tuple) else out
        return out

    return layer_forward


class ModelView:
    """A decoder-only model running flat tokens over a `RaggedCache`.

    Args:
        model: the user's model; its weights are shared, its modules are copied.

    Raises:
        Unsupported: no way to run it raggedly gives what it gives by itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        names.check()
        attention.install()
        self.source = model
        self._cache_argument, self._decoders_cache_argument = map(names.cache_argument, (model, model.get_decoder()))
        self._look = Look(model)
        self.written: set[int] = set()  # ids of what its forwards write to, where that forbids a view
        self.module = self._look.twin(model)
        self.module.config._attn_implementation = attention.NAME
        self.module.config.get_text_config()._attn_implementation = attention.NAME
        # A region takes no weights that are tensors of tensors, as torchao's: with these, every layer compiles.
        weights = chain(model.parameters(), model.buffers())
        regions = [] if any(map(is_traceable_wrapper_subclass, weights)) else decoder_layers(self.module)
        for layer in regions:
            vars(layer)["forward"] = types.MethodType(as_region(type(layer).forward), layer)
        weight = next(model.parameters())
        self.attach(RaggedCache(Way.FUSED if can_run(weight) else Way.MASKED))
        self._n_positions = learned_positions(model.config)
        self.layer_shapes: list[tuple[int, int, int]] = []
        self.recorder: CapturedSteps | None = None
        self.adaptive: AdaptiveTokens | None = None
        self._layers_kept: tuple[int, ...] = ()
        self._chain = TokenTree.chain(max(RECORDED) - 1).tensors(model.device)
        prove(self)
        self._look = Look(model)  # again: a model may count how often it is run

    @property
    def is_current(self) -> bool:
        """Whether the user's model still holds the very weights, settings and code this view was made from.

        The weights' values may change freely; compiled steps, and the proof, rely on the rest.

        Raises:
            Unsupported: nobody can say.
        """
        return Look(self.source).seen == self._look.seen

    @property
    def traits(self) -> dict[int, object]:
        """What the user's model was like, to compare; but for what it writes to by itself."""
        return {key: tokens for key, tokens in self._look.seen.items() if key not in self.written}

    def check_untouched(self, run: Callable[[], object]) -> None:
        """Whether running the user's model changes nothing but what its modules note about themselves. What has been
        written until now may be tables that are filled once: `run` runs the model again, with other texts.

        Raises:
            Unsupported: there is something that this view's forwards, which run drafts too, would write to.
        """
        if not self._look.written(self.source):
            return
        self._look = Look(self.source)
        run()
        if written := self._look.written(self.source):
            self.written = written
            raise Unsupported(f"a forward that writes to {self._look.name_of(min(written), self.source)}")

    def keep_features(self, layers: Sequence[int]) -> None:
        """From now on forwards also give what comes out of these of the decoder's layers, counted from 0, before the
        final norm.

        Raises:
            ValueError: there is no such layer.
        """
        own = decoder_layers(self.module)
        if wrong := [layer for layer in layers if not 0 <= layer < len(own)]:
            raise ValueError(f"no layer {wrong[0]}: the model has {len(own)} layers, counted from 0")
        for index in set(layers) - set(self._layers_kept):
            vars(own[index])["forward"] = _noting(own[index].forward, self.cache, index)
        self._layers_kept = tuple(layers)

    @property
    def device(self) -> torch.device:
        return self.module.device

    def cache_bytes(self, n_batch: int, n_slots: int) -> int:
        """Of a cache for `n_batch` samples of `n_slots` slots each."""
        per_slot = sum(groups * sum(dims) for groups, *dims in self.layer_shapes)
        return per_slot * n_batch * n_slots * self.module.dtype.itemsize

    def activation_bytes(self, n_tokens: int, reach: int, n_logits: int) -> int:
        """About what a forward takes beside weights and cache: of `n_tokens` tokens in all that see `reach` each, or of
        one that makes `n_logits` rows of logits."""
        config, size = self.module.config.get_text_config(), self.module.dtype.itemsize
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        mlp = n_tokens * (4 * config.hidden_size + 3 * inner) * size
        has_scores = self.device.type != "cuda" or self.cache.way is not Way.FUSED
        dense = n_tokens * reach * config.num_attention_heads * 3 * 4 if has_scores else 0
        return max(mlp, dense, n_logits * config.vocab_size * (size + 4))

    def attach(self, cache: RaggedCache) -> None:
        """From now on forwards are over this cache; over another view's, that makes room, and keeps texts, for both."""
        self.cache = cache
        self.module.config.specdec_cache = self.module.config.get_text_config().specdec_cache = cache

    def allocate(self, n_batch: int, n_slots: int) -> None:
        """An empty cache for `n_batch` samples of `n_slots` slots each."""
        like = torch.empty(0, dtype=self.module.dtype, device=self.device)
        self.cache.allocate(self.layer_shapes, n_batch, n_slots, like)

    def insert(self, adaptive: AdaptiveTokens) -> None:
        """From now on tokens may be slots of these."""
        self.adaptive = copy.deepcopy(adaptive).to(self.device, self.module.dtype)
        self.adaptive.insert(self.module)

    def forward(
        self, tokens: Tensor, nodes: Nodes, rows: Tensor | int = 0, slots: Tensor | None = None
    ) -> Output:  # fmt: skip
        """What the model says of the flat tokens; their keys and values are written to the cache.

        Args:
            tokens: [T] int64. nodes: where they belong. rows: [M] int64, the tokens whose logits are wanted, or 0
                for all. slots: [T] int64, which of them are slots of adaptive tokens, 0 for none (see
                `specdec.hf.adaptive`); None where none is.
        """
        given = {"use_cache": True, "logits_to_keep": rows, self._cache_argument: self.cache}
        with self.cache.forward(nodes) as features, nullcontext() if slots is None else self._as_slots(slots):
            out = self.module(input_ids=tokens[None], position_ids=self._positions(nodes), **given)
        logits = out.logits[0]
        if self.cache.way is Way.OWN:  # the model's own attention knows nothing of lost slots
            lost = self.cache.sees_lost(nodes)
            logits = torch.where(lost[:, None] if isinstance(rows, int) else lost[rows, None], torch.nan, logits)
        if not self._layers_kept:
            return Output(logits)
        return Output(logits, torch.stack([features[layer][0] for layer in self._layers_kept]))

    def _as_slots(self, slots: Tensor) -> AbstractContextManager[None]:
        assert self.adaptive is not None, "slots, and no adaptive tokens"
        return self.adaptive.rows.at(slots[None])

    def _positions(self, nodes: Nodes) -> Tensor:
        # Drafts may reach past a table of positions near the end of a text; they are never accepted there.
        position = nodes.position if self._n_positions is None else nodes.position.clamp(max=self._n_positions - 1)
        return position[None]

    def prefill(self, texts: Mapping[int, tuple[int, Tensor]], chunk: int = 2048) -> None:
        """Write the keys and values of texts, `chunk` tokens of all together at a time; see `write`."""
        while texts:
            texts = self.write(texts, chunk)

    def write(self, texts: Mapping[int, tuple[int, Tensor]], n_tokens: int) -> dict[int, tuple[int, Tensor]]:
        """Write the keys and values of the next tokens of some texts, packed without padding, in one forward.

        Args:
            texts: by row of the batch, how many of its leading tokens have been written, and the text, [length] int64,
                on any device. n_tokens: at most this many of all together, first come, first served.

        Returns:
            The same of those texts that are not all written yet.
        """
        ends, room = {}, n_tokens
        for row, (written, text) in texts.items():
            ends[row] = written + min(len(text) - written, room)
            room -= ends[row] - written
        rows = sorted(row for row in texts if ends[row] > texts[row][0])
        if rows:
            self._write({row: (texts[row][0], texts[row][1][texts[row][0] : ends[row]]) for row in rows})
        return {row: (ends[row], text) for row, (_, text) in texts.items() if ends[row] < len(text)}

    def _write(self, pieces: Mapping[int, tuple[int, Tensor]]) -> None:
        """One forward of pieces of texts, in ascending order of rows: where each begins, and its tokens."""
        done, counts = [0] * self.cache.n_batch, [0] * self.cache.n_batch
        for row, (written, piece) in pieces.items():
            done[row], counts[row] = written, len(piece)
        tokens = torch.cat([piece for _, piece in pieces.values()]).to(self.device, non_blocking=True)
        n_written = self._sent(done), self._sent(counts)
        size = min((size for size in RECORDED if size >= len(tokens)), default=None)
        if self.recorder is not None and self.cache.way is Way.FUSED and size is not None:
            self._write_recorded(self.recorder, F.pad(tokens, (0, size - len(tokens))), *n_written)
            return
        token = torch.arange(len(tokens), device=self.device, dtype=torch.int64)
        nodes = Nodes.packed(*n_written, token, max(counts), self.cache.n_slots)
        reach = max(map(sum, zip(done, counts, strict=True)))
        self._fill(tokens, replace(nodes, among=self._sent(list(pieces)), reach=reach))

    def record(self) -> None:
        """Compile and record all that is recorded of `write`, with texts of no tokens."""
        if self.recorder is None or self.cache.way is not Way.FUSED:
            return
        for size in RECORDED:
            for _ in range(2):
                none = [0] * self.cache.n_batch
                tokens, done, counts = map(self._sent, ([0] * size, none, none))
                self._write_recorded(self.recorder, tokens, done, counts, compiles=True)

    def _write_recorded(
        self, recorder: CapturedSteps, tokens: Tensor, done: Tensor, counts: Tensor, compiles: bool = False
    ) -> None:
        """Compiling takes longer than all that most calls write: it is for who warms up."""
        for tensor in (done, counts) if len(done) > 1 else ():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.maybe_mark_dynamic(tokens, 0)
        write = recorder.get(self.write_packed, ("write", self, len(done) == 1), len(tokens), compiles)
        write(tokens, done, counts)

    def write_packed(self, tokens: Tensor, done: Tensor, counts: Tensor) -> Tensor:
        """Write keys and values of the next tokens of texts, on the device.

        Args:
            tokens: [T] int64, of all texts, one after the other; those past the sum of `counts` are nobody's.
            done, counts: [B] int64, how many tokens of each have been written, and are to be.

        Returns:
            What comes out of the last layer, [1, T, H]: without it, compilers see no reason to run any.
        """
        token = torch.arange(len(tokens), device=tokens.device, dtype=torch.int64)
        # As a chain of nodes, the text is attended to, and its entries written, as in a step.
        nodes = Nodes.packed(done, counts, token, len(tokens), self.cache.n_slots, *self._chain)
        return self._fill(tokens, nodes)

    def _fill(self, tokens: Tensor, nodes: Nodes) -> Tensor:
        given = {"use_cache": True, self._decoders_cache_argument: self.cache}
        with self.cache.forward(nodes):
            out = self.module.get_decoder()(input_ids=tokens[None], position_ids=self._positions(nodes), **given)
        return out[0]

    def _sent(self, numbers: list[int]) -> Tensor:
        """[n] int64 on the device, which nobody waits for."""
        on_gpu = self.device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        return host.to(self.device, non_blocking=True)
