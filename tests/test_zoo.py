"""The bundled pair and the enlarger."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec import zoo
from specdec.hf.adaptive import AdaptiveTokens
from specdec.training.evaluate import agreement, mean_loss
from specdec.training.slots import SlotModel

Pair = tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return zoo.load_pair()


@pytest.fixture(scope="module")
def rows(pair: Pair) -> list[torch.Tensor]:
    """Held-out text in the windows that the training scored."""
    glance = zoo.metrics()["glance"]
    ids = [token for text in zoo.held_out_texts() for token in [*pair[2](text)["input_ids"], pair[2].eos_token_id]]
    return list(torch.tensor(ids[: glance["tokens"]]).split(glance["window"]))


def shape_of(model: LlamaForCausalLM, **changes: int) -> dict[str, int]:
    return {key: getattr(model.config, key) for key in zoo.SIZES["25m"]} | changes


def logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_the_models_score_what_the_card_states(pair: Pair, rows: list[torch.Tensor]) -> None:
    target, draft, _ = pair
    stated = zoo.metrics()["glance"]
    assert mean_loss(target, rows) == pytest.approx(stated["loss"], abs=0.01)
    measured = agreement(target, draft, rows)
    assert measured["greedy"] == pytest.approx(stated["greedy"], abs=0.01)
    assert measured["overlap"] == pytest.approx(stated["overlap"], abs=0.01)


def test_the_target_writes_something_like_python(pair: Pair) -> None:
    target, _, tokenizer = pair
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("import os\n\n\ndef read(path):")["input_ids"]]])
    text = tokenizer.decode(target.generate(ids, do_sample=False, max_new_tokens=80)[0], skip_special_tokens=True)
    assert "\n    " in text.split("def read(path):")[1]
    lines = text.splitlines()
    assert any(parses("\n".join(lines[:end])) for end in range(5, len(lines) + 1)), text


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def test_generate_is_silent(pair: Pair, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    target, draft, tokenizer = pair
    batch = tokenizer(["def f", "class A:\n    def"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0  # padded on the left
    batch.pop("token_type_ids", None)
    for model in (target, draft):
        model.generate(**batch, max_new_tokens=4)
    assert not caplog.records and not recwarn.list


def test_text_survives_the_tokenizer(pair: Pair) -> None:
    text = "def f(x):\n\tif x:\n        return 'naïve – \u2603'  # done\n"
    assert pair[2].decode(pair[2](text)["input_ids"]) == text


def test_prompts_are_the_same_every_time(pair: Pair) -> None:
    first, again = (zoo.held_out_prompts(pair[2], 5, 40) for _ in range(2))
    assert first.shape == (5, 40) and torch.equal(first, again)
    with pytest.raises(ValueError, match=r"prompts of 100000 tokens, 5 were asked for"):
        zoo.held_out_prompts(pair[2], 5, 100_000)


def test_everything_shipped_is_small() -> None:
    assert sum(path.stat().st_size for path in Path(zoo.FOLDER).rglob("*") if path.is_file()) < 12_000_000


CHANGES = [
    {"head_dim": 128},
    {"hidden_size": 512, "intermediate_size": 1000},
    {"hidden_size": 300},
    {"hidden_size": 264, "num_attention_heads": 12, "num_key_value_heads": 4},  # groups of 3 for groups of 2
    {"num_attention_heads": 8, "num_key_value_heads": 8},  # groups of 1 for groups of 2
    {"num_hidden_layers": 6},
    {"hidden_size": 512, "head_dim": 128, "num_attention_heads": 8, "num_hidden_layers": 5, "vocab_size": 5000},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_an_enlarged_target_has_the_same_logits(pair: Pair, changes: dict[str, int]) -> None:
    target, _, tokenizer = pair
    big = zoo.enlarge(target, **shape_of(target, **changes))
    ids = zoo.held_out_prompts(tokenizer, 2, 200)
    assert (logits(big, ids)[..., :4096] - logits(target, ids)).abs().max() < 1e-4


def test_an_enlarged_target_writes_the_same_tokens(pair: Pair) -> None:
    target, _, tokenizer = pair
    big = zoo.enlarge(target, **zoo.SIZES["25m"])
    ids = zoo.held_out_prompts(tokenizer, 1, 20)
    written = [model.generate(ids, do_sample=False, max_new_tokens=200) for model in (target, big)]
    assert torch.equal(*written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padded_tokens_are_never_likely(pair: Pair, dtype: torch.dtype) -> None:
    ids = zoo.held_out_prompts(pair[2], 2, 200)
    shape = shape_of(pair[0], hidden_size=512, vocab_size=6000)
    for model in (zoo.enlarge(pair[0], **shape, dtype=dtype), zoo.pad_vocabulary(pair[1], 6000, dtype=dtype)):
        assert model.dtype == dtype
        scores = logits(model, ids)
        assert scores[..., 4096:].max() < scores[..., :4096].min() - 200
        assert scores.softmax(-1)[..., 4096:].max() == 0


def test_bfloat16_stays_close(pair: Pair) -> None:
    target, _, tokenizer = pair
    big = zoo.enlarge(target, **zoo.SIZES["25m"], dtype=torch.bfloat16)
    ids = zoo.held_out_prompts(tokenizer, 2, 100)
    p, q = (logits(model, ids).softmax(-1) for model in (target, big))
    assert torch.minimum(p, q).sum(-1).mean() > 0.97


def test_an_enlarged_model_can_be_saved(pair: Pair, tmp_path: Path) -> None:
    big = zoo.enlarge(pair[1], **shape_of(pair[1], head_dim=64, hidden_size=192, num_hidden_layers=3, vocab_size=5000))
    big.save_pretrained(tmp_path)
    ids = zoo.held_out_prompts(pair[2], 1, 50)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), ids), logits(big, ids))


@pytest.mark.parametrize(
    ("name", "number"), [("25m", 25e6), ("100m", 100e6), ("300m", 300e6), ("1b", 1.5e9), ("8b", 8e9)]
)
def test_sizes_hold_what_their_names_say(name: str, number: float) -> None:
    """1b: that of the model's whose head is its embeddings, and a head."""
    config = LlamaConfig(**{"vocab_size": 4096, "tie_word_embeddings": False} | zoo.SIZES[name])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(number, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 200}, "hidden_size 200 is smaller than the model's 256"),
        ({"vocab_size": 100}, "vocab_size 100 is smaller than the model's 4096"),
        ({"head_dim": 96}, "head_dim 96 is not a multiple of 64"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
        ({"hidden_size": 257}, "hidden_size 257 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 2}, "num_key_value_heads 2 is below the 4"),
        ({"vocab_size": 5000}, "vocab_size 5000 above the model's 4096 needs a spare channel"),
    ],
)
def test_a_shape_that_is_too_small_is_refused(pair: Pair, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.enlarge(pair[0], **shape_of(pair[0], **changes))


@torch.no_grad()
def test_enlarged_adaptive_tokens_say_the_same(pair: Pair) -> None:
    target, _, tokenizer = pair
    tokens = AdaptiveTokens.load(zoo.FOLDER / "target", target)
    big = zoo.enlarge(target, **zoo.SIZES["25m"])
    ids, anchors = zoo.held_out_prompts(tokenizer, 2, 40), torch.tensor([12, 30])
    small = SlotModel.of(target, tokens).forward(ids, anchors)
    large = SlotModel.of(big, zoo.enlarge_adaptive(tokens, target, big)).forward(ids, anchors)
    for ours, theirs in zip(large, small, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="a vocabulary of 4096, and the big model's is 5000"):
        zoo.enlarge_adaptive(tokens, target, zoo.enlarge(target, **shape_of(target, hidden_size=320, vocab_size=5000)))
