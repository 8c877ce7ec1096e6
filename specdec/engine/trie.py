"""A trie of one sample's uncommitted nodes, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Trie:
    """One sample's beams: how many tokens of its text are committed, and the nodes after them, parents first."""

    length: int
    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])

    def child(self, node: int, token: int) -> int:
        """The node of this token after a node, which is made if there is none."""
        if token not in self.children[node]:
            self.children[node][token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(self.depths[node] + 1)
            self.children.append({})
        return self.children[node][token]

    def path(self, node: int) -> list[int]:
        """The nodes from node 0 to this one."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def kept(self, beams: Sequence[int], is_done: set[int]) -> tuple[list[int], list[int]]:
        """What can be committed, a path from node 0 on, and the nodes that stay, of which the first, the path's next,
        becomes node 0: it is one of `is_done`, as all before it are, and all beams go through it."""
        paths = [self.path(beam) for beam in beams]
        common = 0
        while all(len(path) > common + 1 for path in paths) and len({path[common + 1] for path in paths}) == 1:
            common += 1
        while common and not is_done.issuperset(paths[0][: common + 1]):
            common -= 1
        above = {node for path in paths for node in path[common:]}
        stays = {paths[0][common]}
        below = set(beams)
        for node in range(len(self.tokens)):
            if node in above or self.parents[node] in below:
                stays.add(node)
            if self.parents[node] in below:
                below.add(node)
        return paths[0][:common], sorted(stays)

    def move(self, path: list[int], stays: list[int]) -> dict[int, int]:
        """Commit and drop what `kept` says; the new numbers of the nodes that stay."""
        new = {node: i for i, node in enumerate(stays)}
        self.length += len(path)
        base = self.depths[stays[0]]
        self.children = [{t: new[n] for t, n in self.children[node].items() if n in new} for node in stays]
        self.parents = [-1, *(new[self.parents[node]] for node in stays[1:])]
        self.depths = [self.depths[node] - base for node in stays]
        self.tokens = [self.tokens[node] for node in stays]
        return new
