"""What compiled steps have read outside of their arguments, and whether it is what it was."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Read:
    """What compiled code has read outside of its arguments.

    Args:
        name: a Python expression. scope: what it is evaluated in. value: what it stood for.
    """

    name: types.CodeType
    scope: dict[str, Any]
    value: Any
    size: int | None

    @property
    def is_current(self) -> bool:
        """Whether it is what it was: the very object, of the same size, or a number alike."""
        try:
            now = eval(self.name, self.scope)
        except Exception:  # it is gone
            return False
        is_same = now is self.value or (type(now) is type(self.value) in (int, float, str) and now == self.value)
        return is_same and _size(now) == self.size


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, dict | list | set) else None


class Guards:
    """What Dynamo would look at before each call of what it has compiled, for one function.

    Modules and settings of a private view never change, or it is made anew. Shapes of tensors do, and are looked at
    each time. Globals, and what is too large for that or a library's own, are looked at once a `generate()` call: what
    has read them is compiled anew, or else each change would be, and recorded steps would not look at all.

    Args:
        is_seen: whether a view would be made anew where this value, of a module, has changed.

    Attributes:
        reads: what is looked at once a call.
    """

    def __init__(self, method: Any, is_seen: Callable[[Any], bool]) -> None:
        parameters = inspect.signature(method.__func__).parameters
        self._scope = {"G": method.__func__.__globals__, next(iter(parameters)): method.__self__}
        self._is_seen = is_seen
        self.reads: list[Read] = []

    @property
    def are_current(self) -> bool:
        """Whether all that was read is what it was."""
        return all(read.is_current for read in self.reads)

    def needed(self, guards: Any) -> list[bool]:
        """Which of Dynamo's guards are to be kept."""
        models = tuple(f"{g.name}." for g in guards if isinstance(g.value, torch.nn.Module))
        unseen = tuple(g.name for g in guards if g.name.startswith(models) and not self._is_seen(g.value))
        return [
            self._is_tensors(g) or ((g.is_global or g.name.startswith(unseen)) and not self._can_look_at(g))
            for g in guards
        ]

    def _is_tensors(self, guard: Any) -> bool:
        return guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") and not isinstance(guard.value, torch.nn.Parameter)

    def _can_look_at(self, guard: Any) -> bool:
        """Whether to look at it from time to time is enough, and possible."""
        if isinstance(guard.value, torch.Tensor):  # they are arguments each time
            return True
        try:
            name = compile(guard.name, "<guard>", "eval")
        except SyntaxError:
            return False
        read = Read(name, self._scope, guard.value, _size(guard.value))
        if read.is_current:
            self.reads.append(read)
        return read.is_current
