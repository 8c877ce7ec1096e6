"""What users hand in, checked where they hand it in: an error names the argument and its value."""

from __future__ import annotations

import operator
from typing import Any

import torch

DRAFTS = '"auto", "ngram", "adaptive", "early-exit:4", a folder or hub id, a model, [model, "ngram"], a Drafter or None'
"""What a draft can be."""


def whole(name: str, value: Any, least: int = 1, hint: str = "") -> int:
    """A whole number of any kind, numpy's and torch's included; `hint` says what else there is.

    Raises:
        TypeError: it is something else, a truth value for one. ValueError: it is less than `least`.
    """
    try:
        number = None if _is_truth(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}{hint}")
    return number


def share(name: str, value: Any) -> float:
    """A number above 0 and at most 1, numpy's and torch's included.

    Raises:
        TypeError: it is something else, a truth value or a text for one. ValueError: it is out of range.
    """
    try:
        number = None if _is_truth(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor of several numbers
        number = None
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {number}")
    return number


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, "bool")


def flag(name: str, value: Any) -> bool:
    """Yes or no.

    Raises:
        TypeError: it is something else, a number for one.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value
