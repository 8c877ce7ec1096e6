"""Seconds of whole `generate()` calls: transformers' ways and specdec's, by size and batch.

`python -m pytest bench/test_end_to_end.py --benchmark-only -k "bundled and not 300m"` selects by size, batch or path.
For ratios use `python -m bench.end_to_end`: it lets the ways take turns, which pytest-benchmark cannot.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from specdec import zoo
from specdec.cli import measure

SIZES = ("bundled", "25m", "100m", "300m")
BATCHES = (1, 4)
PATHS = (
    "transformers", "transformers_compiled", "transformers_lookup", "transformers_assisted", "specdec_plain",
    "specdec_ngram", "specdec",
)  # fmt: skip
SINGLE = ("transformers_lookup", "transformers_assisted")  # one sample only
PROMPT_TOKENS, NEW_TOKENS = 64, 128


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, measure.Path], Tensor]:
    """All paths of a size, and four prompts."""
    measure.quiet()
    target, draft, tokenizer = measure.load_pair(request.param)
    return measure.all_paths(target, draft), zoo.held_out_prompts(tokenizer, max(BATCHES), PROMPT_TOKENS)


@pytest.mark.parametrize(
    ("batch", "name"), [(batch, name) for batch in BATCHES for name in PATHS if batch == 1 or name not in SINGLE]
)
@pytest.mark.parametrize("pair", SIZES, indirect=True)
def test_generate(benchmark: Any, pair: tuple[dict[str, measure.Path], Tensor], batch: int, name: str) -> None:
    paths, prompts = pair
    benchmark.group = benchmark.name.rpartition("-")[0].partition("[")[2]
    benchmark.pedantic(paths[name], (prompts[:batch], NEW_TOKENS), rounds=3, warmup_rounds=2)
    if hasattr(paths[name].model, "specdec"):
        measure.check(paths[name].label, paths[name].model.specdec.stats)
    benchmark.extra_info["tokens_per_second"] = batch * NEW_TOKENS / benchmark.stats.stats.median
