"""Bad input: a clear error of the type transformers raises, and a model that works again afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import Prompts, Tiny, wrap
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec import TokenTree
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.draft import Draft

TREE = TokenTree.from_widths(2, 1)


@pytest.fixture
def still_works(model: PreTrainedModel, prompts: Prompts) -> Callable[[PreTrainedModel], None]:
    """The wrapped model decodes as if nothing had happened, without falling back."""

    def check(wrapped: PreTrainedModel) -> None:
        inputs = prompts([6, 2, 9])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="specdec")
            out = wrapped.generate(**inputs, max_new_tokens=8)
        assert torch.equal(out, model.generate(**inputs, max_new_tokens=8))

    return check


# What compile() refuses.


@pytest.mark.parametrize("vocab", [96, 98])
def test_vocabularies_must_match(vocab: int, model: PreTrainedModel, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=f"(?=.*{vocab})(?=.*97)"):
        wrap(model, tiny("llama", vocab_size=vocab))


def test_devices_must_match(model: PreTrainedModel, fresh: Tiny) -> None:
    with pytest.raises(ValueError, match=r"(?=.*meta)(?=.*cpu)"):
        wrap(model, fresh("llama").to("meta"))


@pytest.mark.parametrize(
    ("draft", "error"),
    [("n-gram", ValueError), ("gpt2", ValueError), (3, TypeError), (torch.nn.Linear(2, 2), TypeError)],
)
def test_what_is_no_draft(draft: Any, error: type[Exception], model: PreTrainedModel) -> None:
    with pytest.raises(error, match="draft must be"):
        wrap(model, draft)


@pytest.mark.parametrize("thing", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(TypeError, match="model must be"):
        specdec.compile(thing)


def test_options(model: PreTrainedModel) -> None:
    with pytest.raises(
        TypeError, match=r"no option 'depht' \(did you mean 'depth'\?\); it has draft, .*, depth, tree, "
    ):
        specdec.compile(model, draft="ngram", depht=4)
    for options in ({"depth": 0}, {"depth": -1}, {"max_ngram": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1"):
            specdec.compile(model, draft="ngram", **options)
    for options in ({"depth": 2.5}, {"max_ngram": 1.5}, {"adapt": "no"}, {"compile": 1}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be (a whole number|True or False), got"):
            specdec.compile(model, draft="ngram", **options)
    with pytest.raises(TypeError, match=r"draft must be .* got type"):
        specdec.compile(model, draft=NgramDrafter)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"verifier": "best"}, ValueError, r"verifier must be one of auto, seqhub, .*coupled, got 'best'"),
        ({"verifier": None}, ValueError, "verifier must be one of .*, got None"),
        ({"tree": (2, 2, 1)}, TypeError, "tree must be a TokenTree, got tuple"),
        ({"tree": TREE, "depth": 2}, ValueError, "depth=2 asks for a chain, and tree for a tree of depth 2"),
        ({"tree": TokenTree.chain(0)}, ValueError, "no drafted nodes"),
        ({"tree": TREE, "verifier": "block"}, ValueError, '"block" verifies chains.*"traversal"'),
    ],
)
def test_trees_and_verifiers(
    options: dict[str, Any], error: type[Exception], message: str, model: PreTrainedModel
) -> None:
    with pytest.raises(error, match=message):
        wrap(model, model, **options)


def test_a_tree_is_for_a_draft_model(model: PreTrainedModel, tiny: Tiny, prompts: Prompts) -> None:
    for draft in (None, "ngram", NgramDrafter(2)):
        with pytest.raises(ValueError, match=r"tree=\(-1, 0, 0, 1, 2\) is what a draft model drafts"):
            wrap(model, draft, tree=TREE)
    with pytest.raises(ValueError, match="a node with 65 children; a draft model drafts 64"):
        wrap(model, model, tree=TokenTree.from_widths(65))
    wrapped = wrap(model, tiny("llama", seed=7), tree=TREE)  # also for one that a call names
    wrapped.generate(**prompts([5]), max_new_tokens=6, assistant_model=model)
    assert wrapped.specdec.stats.accepted == [2, 2]


def test_a_chain_may_be_verified_as_a_block(model: PreTrainedModel, still_works: Any) -> None:
    still_works(wrap(model, model, tree=TokenTree.chain(2), verifier="block"))


def test_a_wrapped_model_is_not_wrapped_again(wrapped: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="already compiled"):
        specdec.compile(wrapped)


def test_a_wrapped_model_may_be_the_draft(model: PreTrainedModel, wrapped: PreTrainedModel, still_works: Any) -> None:
    still_works(wrap(model, wrapped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_draft_of_another_dtype_works(
    dtype: torch.dtype, model: PreTrainedModel, fresh: Tiny, still_works: Any
) -> None:
    wrapped = wrap(model, fresh("llama").to(dtype))
    still_works(wrapped)
    assert wrapped.specdec.stats.acceptance_by_position[0] > 0.7
    assert wrapped.generate(max_new_tokens=6, do_sample=True).shape == (1, 7)


# What generate() refuses, or takes.


def _outcome(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | type[Exception]:
    torch.manual_seed(0)
    try:
        return model.generate(**arguments)
    except Exception as error:
        return type(error)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CASES: dict[str, dict[str, Any]] = {
    "holes in the mask": {"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]])},
    "right padding": {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])},
    "a row without text": {"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])},
    "a mask of bools": {"attention_mask": torch.tensor([[False, True, True, True], [True] * 4])},
    "a mask too short": {"attention_mask": torch.ones(2, 3, dtype=torch.int64)},
    "a mask of four dimensions": {"attention_mask": torch.ones(2, 1, 4, 4)},
    "positions from elsewhere": {"position_ids": torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3]])},
    "an empty prompt": {"inputs": IDS[:, :0]},
    "no prompt and no rows": {"inputs": IDS[:0]},
    "one row, flat": {"inputs": IDS[0]},
    "float tokens": {"inputs": IDS.float()},
    "int32 tokens": {"inputs": IDS.int()},
    "a token past the vocabulary": {"inputs": torch.tensor([[5, 97]])},
    "a negative token": {"inputs": torch.tensor([[5, -3]])},
    "no new tokens": {"max_new_tokens": 0},
    "fewer than no new tokens": {"max_new_tokens": -1},
    "one new token": {"max_new_tokens": 1},
    "max_length already reached": {"max_new_tokens": None, "max_length": 4},
    "past the positions the model was made for": {"inputs": IDS.repeat(1, 70)},
    "temperature zero": {"do_sample": True, "temperature": 0.0},
    "temperature below zero": {"do_sample": True, "temperature": -1.0},
    "top_p below zero": {"do_sample": True, "top_p": -0.5},
    "an argument nobody knows": {"flavour": "sweet"},
    "embeddings instead of tokens": {"inputs": None, "inputs_embeds": torch.ones(2, 3, 32)},
    "hidden states": {"return_dict_in_generate": False, "output_hidden_states": True},
    "several sequences of a greedy text": {"num_return_sequences": 2},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_same_outcome_as_transformers(
    case: str, wrapped: PreTrainedModel, model: PreTrainedModel, still_works: Any
) -> None:
    arguments = {"inputs": IDS, "max_new_tokens": 6, **CASES[case]}
    expected, ours = _outcome(model, arguments), _outcome(wrapped, arguments)
    if isinstance(expected, Tensor):
        assert isinstance(ours, Tensor), ours
        assert torch.equal(ours, expected)
    else:
        assert ours is expected
    still_works(wrapped)


def test_gpt2_beyond_its_context_fails_as_in_transformers(tiny: Tiny, prompts: Prompts) -> None:
    model = tiny("gpt2")
    wrapped, said = wrap(model, "ngram"), []
    for arguments in ({**prompts([120]), "max_new_tokens": 20}, {**prompts([140]), "max_new_tokens": 2}):
        with pytest.raises(IndexError):
            model.generate(**arguments)
        with warnings.catch_warnings(record=True) as caught, pytest.raises(IndexError):
            warnings.simplefilter("always")
            wrapped.generate(**arguments)
        said.append([str(w.message) for w in caught if issubclass(w.category, specdec.SpecdecWarning)])
    assert [len(messages) for messages in said] == [1, 0]  # one reason, whatever the lengths
    assert "a text of 140 tokens for 128 positions" in said[0][0]
    assert [*wrapped.specdec.stats.fallbacks.values()] == [2]
    inputs = prompts([20])
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=6), model.generate(**inputs, max_new_tokens=6))


# Broken numbers.


def _break_row_of_logits(model: PreTrainedModel, token: int) -> None:
    """From `token` on, texts have NaN logits."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")


def test_greedy_with_nan_logits_is_as_in_transformers(fresh: Tiny, prompts: Prompts) -> None:
    model = fresh("llama")
    _break_row_of_logits(model, int(prompts([6, 2, 9])["input_ids"][0, -1]))
    expected = model.generate(**prompts([6, 2, 9]), max_new_tokens=8)
    for draft in (None, "ngram", model):
        assert torch.equal(wrap(model, draft).generate(**prompts([6, 2, 9]), max_new_tokens=8), expected)


@pytest.mark.parametrize("draft", [None, "ngram", "self"])
def test_sampling_from_nan_logits_is_an_error(
    draft: str | None, fresh: Tiny, model: PreTrainedModel, prompts: Prompts, still_works: Any
) -> None:
    broken = fresh("llama")
    inputs = prompts([6, 2, 9])
    _break_row_of_logits(broken, int(inputs["input_ids"][1, -1]))
    wrapped = wrap(broken, broken if draft == "self" else draft)
    wrapped.specdec.seeds = [0, 0, 0]  # with others another sample may draw the token after which there is no law
    with pytest.raises((RuntimeError, ValueError), match=r"row 1.*NaN"):
        wrapped.generate(**inputs, max_new_tokens=8, do_sample=True)
    broken.load_state_dict(model.state_dict())
    still_works(wrapped)


def test_the_error_about_nan_logits_is_of_the_type_transformers_raises(fresh: Tiny, prompts: Prompts) -> None:
    broken = fresh("llama")
    inputs = prompts([6])
    _break_row_of_logits(broken, int(inputs["input_ids"][0, -1]))
    for model in (broken, wrap(broken)):
        with pytest.raises(RuntimeError):
            model.generate(**inputs, max_new_tokens=8, do_sample=True)


class _Insists(NgramDrafter):
    """Proposes one token again and again."""

    def __init__(self, token: int) -> None:
        super().__init__(2)
        self.token = token

    def draft(self, *arguments: Any) -> Draft:
        draft = super().draft(*arguments)
        tokens = torch.full_like(draft.tokens, self.token)
        return Draft(tokens, torch.full_like(draft.counts, 2))


def test_nan_after_a_rejected_draft_is_no_error(fresh: Tiny, prompts: Prompts) -> None:
    """The target breaks after token 3, which it does not say: only the draft goes there."""
    model = fresh("llama")
    _break_row_of_logits(model, 3)
    arguments = {"inputs": torch.tensor([[5, 6, 7]]), "do_sample": True, "top_k": 2, "max_new_tokens": 4}
    wrapped = wrap(model, _Insists(3))
    torch.manual_seed(0)
    assert 3 not in model.generate(**arguments)
    assert 3 not in wrapped.generate(**arguments)


def test_a_broken_draft_costs_speed_and_nothing_else(
    model: PreTrainedModel, fresh: Tiny, prompts: Prompts, still_works: Any
) -> None:
    draft = fresh("llama", seed=7)
    wrapped = wrap(model, draft)
    still_works(wrapped)
    with torch.no_grad():
        draft.lm_head.weight.fill_(float("nan"))
    still_works(wrapped)
    wrapped.specdec.stats.reset()
    out = wrapped.generate(**prompts([6, 2]), max_new_tokens=8, do_sample=True)
    assert out.shape == (2, 14)
    assert sum(wrapped.specdec.stats.accepted[1:]) == 0


# Interruptions.


class _Raises(NgramDrafter):
    """Raises at its third step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(3)
        self.error, self.calls = error, 0

    def draft(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return super().draft(*arguments)


class _Stops:
    """A streamer that raises at its fourth token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 5:
            raise self.error

    def end(self) -> None:
        raise AssertionError("the text has no end")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of ideas"), StopIteration()])
def test_a_draft_that_raises(error: BaseException, model: PreTrainedModel, prompts: Prompts, still_works: Any) -> None:
    wrapped = wrap(model, _Raises(error))
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        wrapped.generate(**prompts([6, 2]), max_new_tokens=20)
    still_works(wrapped)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the pipe is closed")])
def test_a_streamer_that_raises(
    error: BaseException, wrapped: PreTrainedModel, prompts: Prompts, still_works: Any
) -> None:
    with pytest.raises(type(error)):
        wrapped.generate(**prompts([6]), max_new_tokens=20, streamer=_Stops(error))
    still_works(wrapped)
    assert torch.is_grad_enabled()


def test_a_model_that_raises(fresh: Tiny, model: PreTrainedModel, prompts: Prompts, still_works: Any) -> None:
    broken = fresh("llama")
    wrapped = wrap(broken, broken)
    still_works(wrapped)
    weight = broken.lm_head.weight
    broken.lm_head.weight = torch.nn.Parameter(weight[:, :-1].clone())
    for _ in range(2):
        with pytest.raises(RuntimeError):
            wrapped.generate(**prompts([6, 2]), max_new_tokens=8)
    broken.lm_head.weight = weight
    still_works(wrapped)


def test_a_vocabulary_resized_after_compile(fresh: Tiny, prompts: Prompts) -> None:
    model, draft = fresh("llama"), fresh("llama", seed=1)
    wrapped = wrap(model, draft)
    wrapped.generate(**prompts([6]), max_new_tokens=3)
    model.resize_token_embeddings(101)
    expected = model.generate(**prompts([6]), max_new_tokens=3)
    with pytest.warns(UserWarning, match=r"without the draft: it does not fit: (?=.*97)(?=.*101)"):
        assert torch.equal(wrapped.generate(**prompts([6]), max_new_tokens=3), expected)
    draft.resize_token_embeddings(101)
    expected = model.generate(**prompts([6]), max_new_tokens=8)
    assert torch.equal(wrapped.generate(**prompts([6]), max_new_tokens=8), expected)
