"""A draft model with a tokenizer of its own: what it reads and what it may propose, in the target's tokens.

Two tokens are the same where they stand for the same text. The draft's law is restricted to the tokens that both
vocabularies have, and renormalised; as the target sees it, it is a law over the target's ids like any other, so every
verifier keeps the output law.

Source: token-level intersection, Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding
Algorithms for Heterogeneous Vocabularies", arXiv 2502.05202.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from specdec.hf.names import PreTrainedModel, PreTrainedTokenizerBase

# The letters byte-level tokenizers write bytes in: printable ones stand for themselves, the others for what comes next.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


@dataclass(frozen=True)
class Overlap:
    """What two vocabularies have in common, by the target's ids; V of them.

    Attributes:
        draft_ids: [V] int64, what the draft reads for each target token. For one that it does not have: its token for
            the longest ending of that text, which says most about what follows; where there is none, its unknown
            token, or else its end of text, or else any that is shared.
        is_shared: [V] bool, the tokens that it may propose.
    """

    draft_ids: Tensor
    is_shared: Tensor

    def to(self, device: torch.device) -> Overlap:
        return Overlap(self.draft_ids.to(device), self.is_shared.to(device))

    def logits(self, logits: Tensor) -> Tensor:
        """The draft's logits [R, its vocabulary] as logits of the target's ids, [R, V]; -inf where not shared."""
        return torch.where(self.is_shared, logits[:, self.draft_ids], -torch.inf)


@dataclass(frozen=True)
class ForeignDraft:
    """A draft model, and the tokenizers that say what its tokens and the target's stand for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft_tokenizer: PreTrainedTokenizerBase

    def overlap(self, target: PreTrainedModel) -> Overlap | None:
        """What it shares with a target; None where both have the same tokens.

        Raises:
            TypeError, ValueError: model or tokenizers are none, or nothing is shared.
        """
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(f"tokenizer and draft_tokenizer are for a draft model, and the draft is {self.model!r}")
        for name, value in (("tokenizer", self.tokenizer), ("draft_tokenizer", self.draft_tokenizer)):
            if not isinstance(value, PreTrainedTokenizerBase):
                raise TypeError(f"{name} must be a transformers tokenizer, got {type(value).__name__}")
        sizes = (model.config.get_text_config().vocab_size for model in (target, self.model))
        return _overlap(weakref.ref(self.tokenizer), weakref.ref(self.draft_tokenizer), *sizes)


@lru_cache(maxsize=8)  # seconds for large vocabularies, and asked for at every call that names an assistant
def _overlap(
    target_ref: weakref.ref[PreTrainedTokenizerBase], draft_ref: weakref.ref[PreTrainedTokenizerBase],
    n_target: int, n_draft: int,
) -> Overlap | None:  # fmt: skip
    """What models of `n_target` and `n_draft` tokens share; tokens without a row in their model are none. The
    tokenizers, which are large, live no longer for being known here."""
    tokenizer, draft_tokenizer = target_ref(), draft_ref()
    assert tokenizer is not None and draft_tokenizer is not None  # who asks holds them
    target, draft = _texts(tokenizer, n_target), _texts(draft_tokenizer, n_draft)
    if n_target == n_draft and target == draft:
        return None
    # A text that two tokens stand for is the later one: single bytes, for texts no other token covers, come first.
    id_of, draft_id_of = ({text: i for i, text in texts.items()} for texts in (target, draft))
    shared = sorted(i for text, i in id_of.items() if text in draft_id_of)
    if not shared:
        ours, theirs = (f"{t.name_or_path or type(t).__name__!r}" for t in (tokenizer, draft_tokenizer))
        raise ValueError(
            f"the draft's {len(draft)} tokens ({theirs}) have none in common with the target's {len(target)} ({ours})"
        )
    candidates = (draft_tokenizer.unk_token_id, draft_tokenizer.eos_token_id, draft_id_of[target[shared[0]]])
    neutral = next(i for i in candidates if i is not None and i < n_draft)
    draft_ids = [neutral] * n_target
    for i, text in target.items():
        endings = (text[at:] for at in range(len(text)))
        draft_ids[i] = next((draft_id_of[ending] for ending in endings if ending in draft_id_of), neutral)
    is_shared = torch.zeros(n_target, dtype=torch.bool, device="cpu")
    is_shared[shared] = True
    return Overlap(torch.tensor(draft_ids, dtype=torch.int64, device="cpu"), is_shared)


def _texts(tokenizer: PreTrainedTokenizerBase, n: int) -> dict[int, bytes]:
    """What each token stands for, by its id, ascending, of those below `n`."""
    tokens, added = sorted((i, token) for token, i in tokenizer.get_vocab().items()), tokenizer.get_added_vocab()
    letters = set(chain.from_iterable(token for _, token in tokens if token not in added))
    # Which sign a space has says how tokens are written; byte-level ones have no letter for the other. Added ones are
    # plain text.
    read: Callable[[str], bytes] = _piece if "▁" in letters else _byte_level if "Ġ" in letters else str.encode
    return {i: token.encode() if token in added else read(token) for i, token in tokens if token and i < n}


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF[letter] for letter in token) if _BYTE_OF.keys() >= set(token) else token.encode()


def _piece(token: str) -> bytes:
    """Of sentencepiece: spaces have a sign, and single bytes are written in hexadecimal."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
