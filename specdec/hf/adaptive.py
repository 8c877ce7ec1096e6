"""Adaptive tokens: what lets a model draft for itself, kept beside its weights.

After SDSAT (semantic adaptive tokens, arXiv 2403.18647): rows of a forward that stand for tokens nobody knows yet, slot
1, 2, ... behind a token, of which slot m says what comes m + 1 places after it. The paper adds a token to the
vocabulary and fine-tunes the model. Here a slot is a vector outside of the vocabulary, and low-rank matrices beside the
linear layers act on slot rows alone: all other rows give the model's own logits, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.hf import names

NAME = "adaptive_tokens"
WEIGHTS, ABOUT = f"{NAME}.safetensors", f"{NAME}.json"
N_SAMPLED, TOLERANCE = 1024, 2**-8
"""Values of the embeddings that are kept to know the model again, and how far off they may be: rounding to bfloat16
moves them by at most 2^-9."""


@dataclass(frozen=True)
class Base:
    """The model that adaptive tokens are of, as far as a file can say."""

    name: str
    kind: str
    hidden_size: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Base:
        config = model.config.get_text_config()
        shape = config.hidden_size, config.num_hidden_layers, model.get_input_embeddings().weight.shape[0]
        return cls(Path(model.config._name_or_path).name or "a model without a name", type(model).__name__, *shape)

    @property
    def shape(self) -> tuple[object, ...]:
        return self.kind, self.hidden_size, self.layers, self.vocabulary

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.kind}, hidden size {self.hidden_size}, {self.layers} layers, vocabulary "
            f"{self.vocabulary})"
        )


def _sample(model: PreTrainedModel) -> Tensor:
    """Some of the embeddings, [N_SAMPLED] float32, by which a model is known again in any dtype."""
    weight = model.get_input_embeddings().weight.detach().flatten()
    place = torch.arange(N_SAMPLED, dtype=torch.int64, device=weight.device) * (len(weight) // N_SAMPLED)
    return weight[place].float().cpu()


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The linear modules of the decoder's layers by their path in the decoder, and how many features they take and
    give."""
    found = {}
    decoder = model.get_decoder()
    for prefix, layer in decoder.named_modules():
        for name, module in layer.named_modules() if isinstance(layer, names.DecoderLayer) else ():
            if isinstance(module, nn.Linear):
                found[f"{prefix}.{name}"] = module.in_features, module.out_features
            elif isinstance(module, names.Conv1D):
                found[f"{prefix}.{name}"] = tuple(module.weight.shape)
    return found


class LowRank(nn.Module):
    """What is added to a linear module's output: `up @ down @ x`, of `down` [rank, in] and `up` [out, rank]."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class _Slots:
    """While it lasts, some rows of a forward are slots. A class, because Dynamo traces these in every version."""

    def __init__(self, holder: Rows, slot: Tensor) -> None:
        self._holder, self._slot = holder, slot

    def __enter__(self) -> None:
        self._holder.slot = self._slot

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.slot = None


class Rows:
    """Which rows of the forward in flight are slots.

    Attributes:
        slot: [B, T] int64, 0 for a standard token, m for slot m; None for a forward without slots, which is the
            model's own.
    """

    def __init__(self) -> None:
        self.slot: Tensor | None = None

    def at(self, slot: Tensor) -> _Slots:
        """A context: rows of the forward in it are these slots."""
        return _Slots(self, slot)


class AdaptiveTokens(nn.Module):
    """The vectors of the slots, and the low-rank matrices of slot rows.

    Args:
        vectors: [L, H], what stands in place of an embedding, for slots 1 to L. adapters: by the path of a linear
            module in the decoder, `down` and `up` (see `LowRank`); none where the model itself was fine-tuned.

    Attributes:
        rows: where forwards of a copy that these are in learn which rows are slots.
    """

    def __init__(self, vectors: Tensor, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.paths = tuple(adapters)
        self.adapters = nn.ModuleList([LowRank(*pair) for pair in adapters.values()])
        self.rows = Rows()

    @classmethod
    def new(cls, model: PreTrainedModel, n_slots: int, rank: int, seed: int = 0) -> AdaptiveTokens:
        """Untrained, float32 on the model's device: slots are an average token, and matrices do nothing yet."""
        generator = torch.Generator("cpu").manual_seed(seed)
        weight = model.get_input_embeddings().weight.detach()
        vectors = weight.float().mean(0).repeat(n_slots, 1)
        adapters = {}
        for path, (n_in, n_out) in linear_layers(model).items() if rank else ():
            down = torch.randn(rank, n_in, generator=generator, dtype=torch.float32, device="cpu") / math.sqrt(n_in)
            up = torch.zeros(n_out, rank, dtype=torch.float32, device=weight.device)
            adapters[path] = down.to(weight.device), up
        return cls(vectors, adapters)

    @property
    def n_slots(self) -> int:
        return len(self.vectors)

    def insert(self, module: PreTrainedModel) -> None:
        """Change a private copy of the model: rows that `rows` calls slots run with these."""
        embedding = module.get_input_embeddings()
        vars(embedding)["forward"] = self._embedding(embedding.forward)
        for path, adapter in zip(self.paths, self.adapters, strict=True):
            linear = module.get_decoder().get_submodule(path)
            vars(linear)["forward"] = self._adapted(linear.forward, adapter)

    def _embedding(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        rows, vectors = self.rows, self.vectors

        def embed(ids: Tensor) -> Tensor:
            own, slot = forward(ids), rows.slot
            if slot is None:
                return own
            return torch.where(slot[..., None] > 0, vectors[(slot - 1).clamp(min=0)].to(own.dtype), own)

        return embed

    def _adapted(self, forward: Callable[[Tensor], Tensor], adapter: nn.Module) -> Callable[[Tensor], Tensor]:
        rows = self.rows

        def linear(x: Tensor) -> Tensor:
            own, slot = forward(x), rows.slot
            if slot is None:
                return own
            # Selected, not multiplied by 0: a standard row's output must stay what it is, to the last bit.
            return torch.where(slot.reshape(*x.shape[:-1], 1) > 0, own + adapter(x), own)

        return linear

    def save(self, folder: Path, model: PreTrainedModel, about: Mapping[str, Any] | None = None) -> None:
        """Write the side files: weights, in float16, and what is to be known `about` them."""
        tensors = {"vectors": self.vectors.detach().half(), "sample": _sample(model)}
        for path, adapter in zip(self.paths, self.adapters, strict=True):
            tensors |= {f"{path}.{name}": weight.detach().half() for name, weight in adapter.named_parameters()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        known = {"slots": self.n_slots, "base": asdict(Base.of(model))} | dict(about or {})
        (folder / ABOUT).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel) -> AdaptiveTokens:
        """Those of a folder, in the model's dtype and on its device.

        Raises:
            ValueError: there are none in the folder, or they are another model's.
        """
        try:
            tensors = load_file(folder / WEIGHTS)
            base = Base(**json.loads((folder / ABOUT).read_text(encoding="utf-8"))["base"])
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no adaptive tokens: {Path(error.filename or WEIGHTS).name}") from None
        own, sample = Base.of(model), _sample(model)
        theirs = tensors.pop("sample")
        if base.shape != own.shape:
            raise ValueError(f"the adaptive tokens in {folder} are of {base}, the model is {own}")
        apart = ((theirs - sample).norm() / theirs.norm()).item()
        if not apart <= TOLERANCE:
            raise ValueError(
                f"the adaptive tokens in {folder} are of {base}, the model is {own} with other weights: its "
                f"embeddings are {apart:.1%} apart from those"
            )
        vectors = tensors.pop("vectors")
        adapters = {
            path: (tensors[f"{path}.down"], tensors[f"{path}.up"])
            for path in linear_layers(model)
            if f"{path}.down" in tensors
        }
        return cls(vectors, adapters).to(model.device, model.dtype).requires_grad_(False)
