"""The vanilla batch, for real: greedy speculative decoding in which every sample is padded to the batch's most.

It is transformers' own forward over transformers' own cache, one column of which belongs to all samples. Prompts are
padded on the left. A step feeds each sample its pending token and its drafts, padded to the most that any sample
feeds; of its columns as many stay as the sample with the most accepted tokens needs. In the others' caches these are
holes: columns that the attention mask hides, for good. Positions count the text alone.

Source: the vanilla method of EMS-SD, arXiv 2405.07542. Letters: B samples, S steps, C columns, R rows a sample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bench.padding_simulator import Trace
from specdec.hf import names

DEPTH, MAX_NGRAM = 8, 3


@dataclass(frozen=True)
class Decoded:
    """What a vanilla batch wrote, and what it took.

    Attributes:
        texts: of each sample, prompt and new tokens, an end-of-text token included.
        trace: its S steps. The first new token of a sample is the prompt's forward's, and in no step.
        columns: [B] int64, by how many columns the cache that held a sample grew while it did.
    """

    texts: list[list[int]]
    trace: Trace
    columns: Tensor


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    eos_ids: Collection[int] = (),
    drop_finished: bool = True,
) -> Decoded:
    """Decode a batch greedily, with n-gram drafts.

    Args:
        model: one with rotary positions and full attention: a sliding window would count the holes.
        prompts: token ids, at least one each. new_tokens: at most so many are added to each. eos_ids: tokens that end
            a text. drop_finished: whether samples that have ended leave the batch; else they are padded on and on.
    """
    texts = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + new_tokens for prompt in prompts]
    batch = _Batch(model, texts)
    fed, added = [], []
    columns = torch.zeros(len(texts), dtype=torch.int64)
    while live := [b for b, text in enumerate(texts) if len(text) < ends[b] and text[-1] not in eos_ids]:
        if drop_finished:
            batch.keep(live)
        drafts = {b: lookup(texts[b], min(DEPTH, ends[b] - len(texts[b]) - 1)) for b in live}
        new = batch.step({b: (texts[b], drafts[b]) for b in live}, eos_ids)
        fed.append([1 + len(drafts[b]) if b in drafts else 0 for b in range(len(texts))])
        added.append([len(new.get(b, [])) for b in range(len(texts))])
        for b, tokens in new.items():
            texts[b] += tokens
        columns[batch.samples] = batch.n_columns - max(map(len, prompts))
    shape = len(fed), len(texts)  # also of no steps at all
    return Decoded(texts, Trace(torch.tensor(fed).view(shape), torch.tensor(added).view(shape)), columns)


class _Batch:
    """Rows of one cache, all of them equally long.

    Args:
        texts: each is fed, and gets its first new token.
    """

    def __init__(self, model: PreTrainedModel, texts: list[list[int]]) -> None:
        self.model, self.cache = model, DynamicCache()
        self.samples = list(range(len(texts)))
        width = max(map(len, texts))
        self.mask = torch.zeros(len(texts), 0, dtype=torch.int64, device=model.device)
        seen = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        best = self._forward(ids, seen, (seen.cumsum(1) - 1).clamp(min=0))
        self.mask = seen.to(model.device)
        for text, row in zip(texts, best, strict=True):
            text.append(row[-1])

    @property
    def n_columns(self) -> int:
        return self.cache.get_seq_length()

    def keep(self, samples: list[int]) -> None:
        """Only these go on."""
        if samples != self.samples:
            rows = torch.tensor([self.samples.index(b) for b in samples], device=self.mask.device)
            self.samples, self.mask = samples, self.mask[rows]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def step(self, inputs: dict[int, tuple[list[int], list[int]]], eos_ids: Collection[int]) -> dict[int, list[int]]:
        """What the model adds to each sample that goes on, of which the text so far and the drafts are given."""
        fed = {b: [text[-1], *drafts] for b, (text, drafts) in inputs.items()}
        n_rows, before = max(map(len, fed.values())), self.n_columns
        ids = torch.zeros(len(self.samples), n_rows, dtype=torch.int64)
        seen, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, b in enumerate(self.samples):
            if b in fed:
                n = len(fed[b])
                ids[row, :n], seen[row, :n] = torch.tensor(fed[b]), 1
                positions[row, :n] = torch.arange(n) + len(inputs[b][0]) - 1
        best = self._forward(ids, seen, positions)
        added = {b: accepted(inputs[b][1], best[row], eos_ids) for row, b in enumerate(self.samples) if b in fed}
        most = max(map(len, added.values()))
        for layer in self.cache.layers:
            layer.keys, layer.values = (x[:, :, : before + most] for x in (layer.keys, layer.values))
        stays = torch.tensor([[int(i < len(added.get(b, []))) for i in range(most)] for b in self.samples])
        self.mask = torch.cat([self.mask, stays.to(self.mask)], 1)
        return added

    def _forward(self, ids: Tensor, seen: Tensor, positions: Tensor) -> list[list[int]]:
        """The best token after each of [B, R] new ones, those that are `seen` and not padding."""
        ids, seen, positions = (x.to(self.mask.device) for x in (ids, seen, positions))
        mask = torch.cat([self.mask, seen], 1)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{names.cache_argument(self.model): self.cache},
        )
        return out.logits.argmax(-1).tolist()


def accepted(drafts: Sequence[int], best: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """The model's own tokens, as long as they were drafted, and one more; an end-of-text token is the last.

    Args:
        best: the model's token after the pending one and after each draft; there may be more.
    """
    added = []
    for token, draft in zip(best, [*drafts, None], strict=False):
        added.append(token)
        if token != draft or token in eos_ids:
            break
    return added


def lookup(text: Sequence[int], n_tokens: int, max_ngram: int = MAX_NGRAM) -> list[int]:
    """The `n_tokens` that followed the latest earlier occurrence of the text's longest suffix that has one, of up to
    `max_ngram` tokens; past the text's end they repeat. None if its last token is a new one.

    Source: Saxena, "Prompt Lookup Decoding", 2023; LLMA, arXiv 2304.04487.
    """
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        suffix = text[-n:]
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == suffix:
                follows = text[end:]
                return [follows[i % len(follows)] for i in range(n_tokens)]
    return []
