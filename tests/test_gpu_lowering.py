"""The steps compile for a GPU that is not there: every graph down to its kernels, and how many of them it launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import aot
import no_device
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec.config import Config
from specdec.drafters.adaptive import Adaptive
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.loop import Decoder
from specdec.engine.roles import Drafter
from specdec.engine.stats import Stats
from specdec.engine.tree import TokenTree
from specdec.graphs import compiled
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.adaptive import AdaptiveTokens, linear_layers
from specdec.hf.laws import law_of
from specdec.hf.view import ModelView
from specdec.verifiers import AUTO

WARPERS = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)]
TORCH = ".".join(torch.__version__.split(".")[:2])
Case = tuple[str, str, str, int]
Models = dict[str, LlamaForCausalLM]

LAUNCHES: dict[str, dict[Case, tuple[int, int]]] = {
    "2.11": {
        ("judge", "chain", "greedy", 1): (10, 20),
        ("judge", "chain", "greedy", 8): (10, 21),
        ("judge", "chain", "sampled", 1): (10, 25),
        ("judge", "chain", "sampled", 8): (10, 26),
        ("draft", "chain", "greedy", 1): (10, 41),
        ("draft", "chain", "greedy", 8): (10, 43),
        ("draft", "chain", "sampled", 1): (10, 54),
        ("draft", "chain", "sampled", 8): (10, 57),
        ("judge", "tree", "greedy", 1): (10, 24),
        ("judge", "tree", "greedy", 8): (10, 24),
        ("judge", "tree", "sampled", 1): (10, 29),
        ("judge", "tree", "sampled", 8): (10, 29),
        ("draft", "tree", "greedy", 1): (10, 29),
        ("draft", "tree", "greedy", 8): (10, 27),
        ("draft", "tree", "sampled", 1): (10, 40),
        ("draft", "tree", "sampled", 8): (10, 37),
        ("draft", "ngram", "greedy", 1): (0, 3),
        ("judge", "ngram", "greedy", 1): (10, 20),
        ("judge", "ngram", "sampled", 1): (10, 29),
        ("judge", "none", "greedy", 1): (10, 16),
        ("judge", "none", "sampled", 1): (10, 20),
        ("draft", "ngram", "greedy", 8): (0, 3),
        ("judge", "ngram", "greedy", 8): (10, 21),
        ("judge", "ngram", "sampled", 8): (10, 30),
        ("judge", "none", "greedy", 8): (10, 16),
        ("judge", "none", "sampled", 8): (10, 20),
        ("write", "none", "greedy", 1): (10, 7),
        ("write", "none", "greedy", 8): (10, 7),
        ("ride", "adaptive", "greedy", 1): (18, 34),
        ("ride", "adaptive", "sampled", 8): (18, 53),
    },
    "2.13": {
        ("judge", "chain", "greedy", 1): (10, 18),
        ("judge", "chain", "greedy", 8): (10, 19),
        ("judge", "chain", "sampled", 1): (10, 23),
        ("judge", "chain", "sampled", 8): (10, 24),
        ("draft", "chain", "greedy", 1): (10, 38),
        ("draft", "chain", "greedy", 8): (10, 40),
        ("draft", "chain", "sampled", 1): (10, 53),
        ("draft", "chain", "sampled", 8): (10, 56),
        ("judge", "tree", "greedy", 1): (10, 23),
        ("judge", "tree", "greedy", 8): (10, 22),
        ("judge", "tree", "sampled", 1): (10, 28),
        ("judge", "tree", "sampled", 8): (10, 27),
        ("draft", "tree", "greedy", 1): (10, 29),
        ("draft", "tree", "greedy", 8): (10, 30),
        ("draft", "tree", "sampled", 1): (10, 41),
        ("draft", "tree", "sampled", 8): (10, 39),
        ("draft", "ngram", "greedy", 1): (0, 3),
        ("judge", "ngram", "greedy", 1): (10, 18),
        ("judge", "ngram", "sampled", 1): (10, 27),
        ("judge", "none", "greedy", 1): (10, 15),
        ("judge", "none", "sampled", 1): (10, 19),
        ("draft", "ngram", "greedy", 8): (0, 3),
        ("judge", "ngram", "greedy", 8): (10, 19),
        ("judge", "ngram", "sampled", 8): (10, 28),
        ("judge", "none", "greedy", 8): (10, 15),
        ("judge", "none", "sampled", 8): (10, 19),
        ("write", "none", "greedy", 1): (10, 6),
        ("write", "none", "greedy", 8): (10, 6),
        ("ride", "adaptive", "greedy", 1): (18, 35),
        ("ride", "adaptive", "sampled", 8): (18, 53),
    },
}
"""What a step launches in each layer and outside of layers: kernels, matrix products and operators of this library. By
the version of torch, step, drafter, how tokens are chosen, and samples. These numbers may only fall."""

STACK_OF_SINES = {"2.11": 72, "2.13": 40}
"""Bytes of stack a thread that kernels may have which compute sines, as of large angles. Others have none."""

FIRST: Case = ("judge", "chain", "greedy", 1)


def _llama(**sizes: int) -> LlamaForCausalLM:
    """Layers of the given sizes, two of them."""
    config = LlamaConfig(
        vocab_size=128256, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, **sizes,
    )  # fmt: skip
    with torch.device(no_device.DEVICE):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def _take_as_proved(view: ModelView) -> None:
    """What a proof finds out of a Llama; there are no numbers to prove anything with."""
    config = view.module.config
    view.layer_shapes = [(config.num_key_value_heads, config.head_dim, config.head_dim)] * config.num_hidden_layers


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, LlamaForCausalLM]]:
    """A target of Llama 8B's layers and a draft of Llama 1B's, on a GPU that is not there."""
    with no_device.fake_h100(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.hf.view.prove", _take_as_proved)
        patch.setattr(compiled, "_has_regions", True)  # put back, whatever becomes of it
        patch.setenv("SPECDEC_STRICT", "1")
        yield {
            "target": _llama(hidden_size=4096, intermediate_size=14336, head_dim=128),
            "draft": _llama(hidden_size=2048, intermediate_size=8192, head_dim=64),
        }


def _drafter(kind: str, model: LlamaForCausalLM, target: ModelView) -> Drafter:
    if kind == "adaptive":
        with torch.device(no_device.DEVICE):
            vectors = torch.zeros(5, 4096, dtype=torch.bfloat16)
            adapters = {
                path: (torch.zeros(32, n_in, dtype=torch.bfloat16), torch.zeros(n_out, 32, dtype=torch.bfloat16))
                for path, (n_in, n_out) in linear_layers(target.module).items()
            }
        target.adaptive = AdaptiveTokens(vectors, adapters)  # as they are: nothing can be copied here
        target.adaptive.insert(target.module)
        return Adaptive(target.adaptive).drafter(target, Config(), AUTO)
    if kind == "none":
        return NoDrafter()
    if kind == "ngram":
        return NgramDrafter()
    return ModelDrafter(ModelView(model), TokenTree.chain(5) if kind == "chain" else TokenTree.from_widths(3, 2, 1))


def _generate(case: Case, models: Models) -> no_device.Code:
    """What is generated for a step."""
    step, kind, how, n_batch = case
    target = ModelView(models["target"])
    decoder = Decoder(target, _drafter(kind, models["draft"], target), CompiledSteps(True), Stats())
    warpers = LogitsProcessorList(WARPERS if how == "sampled" else [])
    law = law_of(warpers, how == "sampled", no_device.DEVICE)
    state = decoder.buffers.open(n_batch, 1024, 64, torch.tensor([1]))
    if step == "write":
        given = torch.zeros(64, dtype=torch.int64), state.lengths, state.lengths
        torch._dynamo.maybe_mark_dynamic(given[0], 0)
        write = decoder.steps.get(decoder.target.write_packed, step, n_batch)
        return no_device.generate(write, *(x.to(no_device.DEVICE) for x in given))
    if step == "draft":
        draft = decoder.steps.get(decoder.step.draft, step, n_batch)
        return no_device.generate(draft, state, law, decoder.launcher.count(n_batch), decoder.tree.depth)
    token = decoder.launcher.count(n_batch * len(decoder.tree))
    judge, n_rows, more = decoder.step.judgement(law, decoder.tree.depth)
    given = [token, decoder.launcher.count(n_rows * len(token))] if n_rows else [token]
    judge = decoder.steps.get(judge, step, tuple(map(len, given)))
    return no_device.generate(judge, state, law, *given, *more)


def _marked(case: Case) -> Any:
    marks = [pytest.mark.lowering, *([pytest.mark.aot] if case == FIRST else [])]
    return pytest.param(case, id="-".join(map(str, case)), marks=marks)


@pytest.mark.parametrize("case", [_marked(case) for case in LAUNCHES["2.11"]])
def test_a_step_compiles_for_a_gpu(
    case: Case, models: Models, compiled_table: list[tuple[str, int, aot.Compiled]]
) -> None:
    code = _generate(case, models)
    assert not code.on_host
    n_launches = {name: len(launched) for name, launched in code.launches.items()}
    layers = [n_launches.pop(name) for name in code.launches if name.startswith("repeated_subgraph")]
    kernels = [kernel for name, source in code.kernels.items() for kernel in no_device.compile_kernel(name, source)]
    compiled_table += [(" ".join(map(str, case)), no_device.ARCHITECTURE, kernel) for kernel in kernels]
    assert not [kernel for kernel in kernels if kernel.stack > (STACK_OF_SINES[TORCH] if "_sin_" in kernel.name else 0)]
    # More is worse; where fewer are launched now, the table has to say so.
    assert (max(layers, default=0), sum(n_launches.values())) == LAUNCHES[TORCH][case]
