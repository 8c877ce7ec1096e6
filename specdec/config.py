"""Every knob of specdec, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.arguments import flag, share, whole
from specdec.engine.tree import TokenTree
from specdec.verifiers import VERIFIERS


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a wrapped model decodes.

    Args:
        depth: tokens drafted a step, as a chain; None takes 5 for a draft model and 8 for n-grams.
        tree: what a draft model drafts instead of a chain: several candidates a place.
        verifier: how candidates are drawn and accepted when sampling; the output law is the same with all of them.
            "auto" and "seqhub" (the best candidates and one drawn, a whole tree judged at once), "traversal" (drawn
            without replacement, a whole tree judged at once), "block" (the same for chains), "spechub", "rrsw", "rrs"
            (node by node), "target" (the best candidates, nothing drawn), "coupled" (a seed's text is the
            same with any draft, or none). With n-grams alone "auto" is "coupled", which accepts as many of them.
        adapt: whether to draft less, or nothing, where that is faster; None where texts do not depend on what is
            drafted: greedily, with n-grams alone, and with "coupled". With True, sampled texts of equal seeds can
            differ from run to run.
        max_ngram: longest suffix the n-gram drafter looks up.
        remember: tokens of earlier texts in which n-grams are looked up, too, where texts do not depend on what is
            drafted. 0 looks at nothing but the text itself.
        stop_below: the chain of a draft model ends after the first token whose probability, by the law that it was
            drawn from, is less than this; greedily by a plain softmax. None never stops. See docs/adaptive.md for what
            it saves.
        compile: False runs every step eagerly, for debugging.
        progress: say on a terminal when something is compiled, and show how far a warm-up is. Logging says it anyway.

    Raises:
        TypeError, ValueError: naming the value that cannot be.
    """

    depth: int | None = None
    tree: TokenTree | None = None
    verifier: str = "auto"
    adapt: bool | None = None
    max_ngram: int = 3
    remember: int = 0
    stop_below: float | None = None
    compile: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        given: dict[str, float] = {
            "max_ngram": whole("max_ngram", self.max_ngram), "remember": whole("remember", self.remember, least=0)
        }  # fmt: skip
        if self.depth is not None:
            given["depth"] = whole("depth", self.depth, hint="; draft=None decodes without drafting")
        if self.stop_below is not None:
            given["stop_below"] = share("stop_below", self.stop_below)
        vars(self).update(given)
        flag("compile", self.compile)
        flag("progress", self.progress)
        if self.adapt is not None:
            flag("adapt", self.adapt)
        if not isinstance(self.verifier, str) or self.verifier not in VERIFIERS:
            raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {self.verifier!r}")
        if self.tree is not None:
            if not isinstance(self.tree, TokenTree):
                raise TypeError(f"tree must be a TokenTree, got {type(self.tree).__name__}")
            if self.tree.depth < 1:
                raise ValueError("tree has no drafted nodes; draft=None decodes without drafting")
            if self.depth is not None:
                raise ValueError(f"depth={self.depth} asks for a chain, and tree for a tree of depth {self.tree.depth}")
            if self.stop_below is not None and not self.tree.is_chain:
                raise ValueError(
                    f"stop_below={self.stop_below} ends chains early, and tree={self.tree.parents} has nodes with "
                    "several children"
                )
            if self.verifier == "block" and not self.tree.is_chain:
                raise ValueError('"block" verifies chains; for trees the same rule is called "traversal"')
