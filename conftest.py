"""Python blocks of README.md and docs/ are tests: a page is one namespace, the bundled pair stands for any model."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import zoo
from specdec.hf import names

_patches = pytest.MonkeyPatch()


def _model(name: str, **_: Any) -> torch.nn.Module:
    """The bundled target, or for a name that says less than 4 billion parameters, the bundled draft."""
    billions = re.search(r"([\d.]+)B", name, re.IGNORECASE)
    target, draft, _ = zoo.load_pair()
    return target if billions is None or float(billions[1]) >= 4 else draft


def _setup(namespace: dict[str, Any]) -> None:
    """Blocks name real models, on GPUs; what they show holds for small ones, uncompiled, on a CPU."""
    torch.set_num_threads(1)
    _patches.setattr(AutoModelForCausalLM, "from_pretrained", _model)
    _patches.setattr(AutoTokenizer, "from_pretrained", lambda name: zoo.load_pair()[2])
    _patches.setattr(specdec, "compile", partial(specdec.compile, compile=False))
    _patches.setattr(torch, "compile", lambda function, **_: function)
    namespace["BEFORE_5_24"] = names.output_name() == "past_key_values"  # for `<!-- skip: next if(...) -->`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, SybilItem) and item.path.name != "fallbacks.md":  # whose subject they are
            item.add_marker(pytest.mark.filterwarnings("error::specdec.SpecdecWarning"))


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_setup,
    teardown=lambda _: _patches.undo(),
).pytest()
