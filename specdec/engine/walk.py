"""Laws that depend on the text: asked on the host for one new token after the other.

A step's forward gives the target's logits after every drafted node. Which of them count is found by walking: logits
processors see the text up to a node, as in transformers' loop, and the target's choice after it is made; where a child
of the node is that very token, it is accepted and the walk goes on. So processors are called for the texts that
transformers calls them for, in the same order, once each: even those that keep a state serve one text at a time.

Sampled choices are drawn with noise that depends on nothing but seed and position: a seed's text is the same with any
draft, or none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from specdec.engine.laws import SamplingLaw
from specdec.engine.state import BatchState
from specdec.engine.text import Text
from specdec.engine.tree import TokenTree
from specdec.kernels.sampling.draw_row import draw_row
from specdec.kernels.sampling.noise import BONUS
from specdec.verifiers.base import Verdict


def walk(
    live: Iterable[tuple[int, Text]], state: BatchState, tree: TokenTree, logits: Tensor, n_nodes: Tensor,
    starts: Tensor, greedy: bool,
) -> tuple[Verdict, Tensor]:  # fmt: skip
    """Each unfinished text's path, chosen token by token.

    Args:
        live: the texts, by row. logits: [T, V], the rows from `starts[b]` on after the nodes of sample b.
        n_nodes: [B] int64, how many nodes of each were judged. starts: [B + 1] int64.

    Returns:
        What the target chose along the drafts, and [B] bool, where a processor or a criterion failed: the text's
        error. Both on the device.
    """
    # The one place where a step waits for the host: a processor is Python that looks at the text.
    drafted, counts, first = state.draft.tokens.tolist(), n_nodes.tolist(), starts.tolist()
    ends, n_rows = set(state.eos_ids.tolist()), len(counts)
    path = [[0] * (tree.depth + 1) for _ in counts]
    accepted, bonus, broken = [0] * n_rows, [0] * n_rows, [False] * n_rows
    for row, text in live:
        ids, node, depth, room = text.ids[None], 0, 0, text.max_new_tokens - len(text.tokens)
        while True:
            try:
                token = bonus[row] = _choose(text, ids, logits[first[row] + node], greedy)
            except Exception as error:
                text.error, broken[row] = error, True
                break
            is_over = text.ends is not None and text.asks([*ids[0, len(text.prompt) :].tolist(), token])
            broken[row] = text.error is not None
            child = next((n for n in tree.children(node) if n < counts[row] and drafted[row][n - 1] == token), None)
            if child is None or token in ends or is_over or depth + 1 == room:  # no more is asked
                break
            node, depth = child, depth + 1
            path[row][depth:] = [child] * (tree.depth + 1 - depth)
            ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
        accepted[row] = depth
    verdict = Verdict(*(torch.tensor(x, dtype=torch.int64, device=logits.device) for x in (path, accepted, bonus)))
    return verdict, torch.tensor(broken, dtype=torch.bool, device=logits.device)


def _choose(text: Text, ids: Tensor, logits: Tensor, greedy: bool) -> int:
    raw = logits[None].to(torch.float32, copy=True)
    scores = raw if text.process is None else text.process(ids, raw)
    if text.record is not None:
        text.record.logits.append(raw)
        text.record.scores.append(scores)
    if greedy:
        return int(scores.argmax(-1))
    law = SamplingLaw(False).rows(scores)
    if not law.log_total.isfinite().all():
        raise RuntimeError("the scores after the logits processors leave no law to sample from")
    seed, place = (ids.new_tensor([x]) for x in (text.seed, ids.shape[1]))
    none = place[:, None][:, :0]
    return int(draw_row(*law, 0 * place, none, none.float(), seed, place, 0 * place, BONUS, True))
