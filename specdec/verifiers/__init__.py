"""Verifiers by name."""

from specdec.verifiers.base import Verifier
from specdec.verifiers.coupled import Coupled
from specdec.verifiers.tree import Rejection, all_but_one, every, likely, none, with_replacement

AUTO: Verifier = Rejection("auto", likely)
VERIFIERS: dict[str, Verifier] = {
    verifier.name: verifier
    for verifier in (
        AUTO,
        Rejection("seqhub", all_but_one),
        Rejection("traversal", none),
        Rejection("block", none),
        Rejection("spechub", all_but_one, sequence=False),
        Rejection("rrsw", none, sequence=False),
        Rejection("rrs", with_replacement, sequence=False),
        Rejection("target", every, sequence=False),
        Coupled(),
    )
}
