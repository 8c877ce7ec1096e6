"""`specdec bench`: what it measures, shows and writes, what it leaves out, and the verdict."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec import zoo
from specdec.cli import inputs, measure
from specdec.cli.app import app
from specdec.cli.texts import Difference, difference
from specdec.cli.verdict import Way, verdict
from specdec.engine.control import Decisions
from specdec.engine.stats import Stats
from specdec.errors import Unsupported
from specdec.hf import call as hf_call

pytestmark = pytest.mark.filterwarnings("ignore")

Call = Callable[..., Any]
OURS = ("specdec_plain", "specdec_ngram", "specdec", "specdec_both")
ALL = ("transformers", "transformers_assisted", *OURS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `target` and `draft`, both with the tokenizer, and `other`: the draft with its ids turned round."""
    folder = tmp_path_factory.mktemp("models")
    target, draft, tokenizer = zoo.load_pair()
    other = copy.deepcopy(draft)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(draft.get_input_embeddings().weight.flip(0))
    for name, model in (("target", target), ("draft", draft), ("other", other)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    turned(tokenizer).save_pretrained(folder / "other")
    return folder


def turned(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with the last id for the first token, and so on."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    last = len(tokenizer) - 1
    state["model"]["vocab"] = {token: last - i for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = last - added["id"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


@pytest.fixture
def bench(tmp_path: Path) -> Call:
    """Run it with the smallest settings on two short prompts: the command's outcome, and the JSON that it wrote."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n\ndef main(argv):\n", encoding="utf-8")

    def run(*arguments: str, code: int = 0) -> tuple[str, dict[str, Any]]:
        quick = ["--no-compile", "--new-tokens", "6", "--repeats", "2", "--prompts", str(prompts)]
        written = tmp_path / "x.json"
        done = CliRunner().invoke(app, ["bench", *quick, "--json", str(written), *arguments], env={"COLUMNS": "200"})
        assert done.exit_code == code, (done.output, done.exception)
        return done.output, json.loads(written.read_text(encoding="utf-8"))

    return run


def names(result: dict[str, Any]) -> tuple[str, ...]:
    return tuple(way["name"] for way in result["ways"])


def test_all_ways_are_shown_and_written(bench: Call, tmp_path: Path) -> None:
    shown, result = bench("--plot", f"{tmp_path}/x.png")
    assert names(result) == ALL and result["rounds"] == 2 and not result["interrupted"] and not result["faults"]
    for way in result["ways"]:
        assert way["label"] in shown and way["difference"] is None
        assert len(way["seconds"]) == 2 and way["tokens"] == 2 * 6
        low, high = way["middle_half"]
        assert low <= way["tokens_per_second"] <= high and way["warmup_seconds"] > 0
        assert (way["stats"] is not None) == (way["name"] in OURS)
    assert [way["depth"] for way in result["ways"]] == [0, 0, 0, 8, 5, 8]
    assert result["ways"][-1]["draft_cost"] > 0 and result["ways"][2]["stats"]["tokens_per_step"] == 1
    assert result["verdict"]["sentence"] in shown and result["verdict"]["code"] in shown
    assert result["versions"] == measure.versions() and result["machine"] == measure.machine()
    assert {"command", "date", "settings", "dtype", "parameters", "notes"} <= set(result)
    assert "accepted by position" in shown and "identical" in shown
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_draft(bench: Call, saved: Path) -> None:
    _, result = bench("--model", str(saved / "target"))
    assert names(result) == ("transformers", "specdec_plain", "specdec_ngram")


def test_the_draft_is_n_grams(bench: Call) -> None:
    _, result = bench("--draft", "ngram")
    assert names(result) == ("transformers", "transformers_lookup", "specdec_plain", "specdec_ngram")


def test_a_draft_with_another_tokenizer(bench: Call, saved: Path) -> None:
    shown, result = bench("--model", str(saved / "target"), "--draft", str(saved / "other"))
    assert names(result) == ("transformers", *OURS) and not result["faults"]
    assert "refuses two tokenizers" in shown
    steps = result["ways"][-1]["stats"]
    assert steps["proposed"] and not steps["dropped_drafts"]


def test_tokenizers_are_given_only_where_they_differ(saved: Path) -> None:
    same = inputs.Sources(str(saved / "target"), str(saved / "draft")).load()
    assert same.draft_tokenizer is not None and same.tokenizers == {}
    other = inputs.Sources(str(saved / "target"), str(saved / "other")).load()
    assert set(other.tokenizers) == {"tokenizer", "draft_tokenizer"}
    padded = inputs.Pair(same.target, zoo.pad_vocabulary(same.draft, 4104), same.tokenizer, same.draft_tokenizer)
    assert set(padded.tokenizers) == {"tokenizer", "draft_tokenizer"}


def test_batches_and_sampling(bench: Call) -> None:
    shown, result = bench("--batch", "3", "--temperature", "0.7", "--draft", "ngram")
    assert names(result) == ("transformers", "specdec_plain", "specdec_ngram")
    assert all(way["tokens"] == 3 * 6 and way["difference"] is None for way in result["ways"])
    assert "cannot be compared" in shown and "one prompt at a time" in shown and "identical" not in shown


def test_batches_are_padded_on_the_left() -> None:
    first, second = inputs.batches([[1, 2, 3], [4], [5, 6]], 2, "cpu")
    assert first[0].tolist() == [[1, 2, 3], [0, 0, 4]] and first[1].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert second[0].tolist() == [[0, 5, 6], [1, 2, 3]] and second[1].tolist() == [[0, 1, 1], [1, 1, 1]]


def _interrupted(after: int) -> Callable[..., torch.Tensor]:
    """A decoding that Ctrl-C stops after so many calls."""
    decode, calls = measure.Path.__call__, iter(range(after))

    def stop(path: measure.Path, *args: Any, **more: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decode(path, *args, **more)

    return stop


@pytest.mark.parametrize(("after", "rounds"), [(3 + 3 + 2, 1), (2, 0)])
def test_an_interruption_keeps_what_is_measured(
    after: int, rounds: int, bench: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Three ways, and both prompts in a batch: three calls warm up, and three more are a round.
    monkeypatch.setattr(measure.Path, "__call__", _interrupted(after))
    shown, result = bench("--draft", "ngram", "--batch", "2", "--plot", f"{tmp_path}/x.png", code=130)
    assert result["interrupted"] and result["rounds"] == rounds and not result["faults"]
    assert [len(way["seconds"]) for way in result["ways"]] == [1] * 3 * rounds
    assert f"Interrupted after {rounds} of 2 rounds. " in shown
    assert result["verdict"]["sentence"].endswith("There is nothing to compare.") == (rounds == 0)
    assert ("tokens/s" in shown) == (tmp_path / "x.png").exists() == (rounds > 0)


def test_an_interruption_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs.Sources, "load", stop)
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 130 and "interrupted before anything was measured" in done.output


def test_what_falls_back_is_left_out(bench: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Unsupported("a stand-in")

    monkeypatch.setattr(hf_call, "check_model", refuse)
    shown, result = bench(code=1)
    assert names(result) == ("transformers", "transformers_assisted")
    assert len(result["faults"]) == 4 and all("transformers' own loop: a stand-in" in line for line in result["faults"])
    assert "failed: bundled: specdec, n-grams" in shown


@pytest.mark.parametrize("when", ["warming up", "measuring"])
def test_what_fails_is_left_out(when: str, bench: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = measure.Path.__call__, iter(range(2 * (when == "measuring")))

    def fail(path: measure.Path, *args: Any, **more: Any) -> torch.Tensor:
        if "n-grams" in path.label and next(calls, None) is None:
            raise RuntimeError("out of luck")
        return decode(path, *args, **more)

    monkeypatch.setattr(measure.Path, "__call__", fail)
    _, result = bench("--draft", "ngram", code=1)
    assert names(result) == ("transformers", "transformers_lookup", "specdec_plain")
    assert result["faults"] == ["bundled: specdec, n-grams failed: RuntimeError: out of luck"]


def test_nothing_is_compared_where_generate_fails(bench: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: measure.Path, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(measure.Path, "__call__", fail)
    _, result = bench(code=1)
    assert not result["ways"] and len(result["faults"]) == 1 and "nothing to compare" in result["verdict"]["sentence"]


def test_a_wrong_text_is_a_fault(bench: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = measure.Path.__call__

    def falsify(path: measure.Path, *args: Any, **more: Any) -> torch.Tensor:
        out = decode(path, *args, **more)
        out[:, -2] += path.label == "specdec, no draft"
        return out

    monkeypatch.setattr(measure.Path, "__call__", falsify)
    shown, result = bench("--draft", "ngram", code=1)
    found = next(way["difference"] for way in result["ways"] if way["name"] == "specdec_plain")
    assert found["texts"] == 2 and found["token"] == 5 and not found["is_rounding"] and found["margin"] > 0.01
    assert len(result["faults"]) == 1 and "more than rounding" in result["faults"][0]
    assert "from new token 5 on" in shown and "different" in shown


def test_rounding_is_told_from_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    logits = model(theirs[:1, 2:5]).logits[0, -1]
    order = logits.argsort(descending=True)
    assert difference(model, [(ids, mask)], [theirs], [theirs]) is None
    for rank in (1, 50):
        ours = theirs.clone()
        ours[0, 5] = order[rank]
        margin = (logits[order[0]] - logits[order[rank]]).item()
        for rounding in (0.9, 1.1):
            monkeypatch.setattr("specdec.cli.texts.ROUNDING", {torch.float32: rounding * margin / logits.abs().max()})
            found = difference(model, [(ids, mask)], [theirs], [ours])
            assert found == Difference(1, 1, 2, pytest.approx(margin, rel=1e-4), rounding > 1)


# What is given is checked before any work.


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading a model is an error that nobody expects."""

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(inputs.Sources, "load", load)
    yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "--model no/such/folder: there is no such folder"),
        (["--draft", "./none"], "--draft ./none: there is no such folder"),
        (["--model", "{folder}"], "--model {folder}: "),
        (["--model", "{folder}", "--size", "25m"], "--size 25m is of the bundled target"),
        (["--dtype", "int4"], "int4"),
        (["--device", "tpu"], "--device tpu: "),
        (["--device", "cuda:77"], "--device cuda:77: "),
        (["--device", "meta"], "--device meta: "),
        (["--batch", "0"], "--batch"),
        (["--temperature", "-1"], "--temperature"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "{folder}/empty.txt"], "empty.txt: there is no prompt in it"),
        (["--prompts", "{folder}/binary.txt"], "binary.txt: not UTF-8 text, byte 2 is 0xff"),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl, line 3: not JSON"),
        (["--prompts", "{folder}/other.jsonl"], 'other.jsonl, line 1: no object with a text as its "prompt"'),
        (["--prompts", "{folder}/long.txt"], "long.txt, line 2: its"),
        (["--new-tokens", "100000"], "built-in prompt 1: its 64 tokens and 100000 new ones"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--plot", "x.pdf"], "must end in .png"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_what_is_wrong_is_said_before_any_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    for name, text in {
        "empty.txt": b"\n  \n",
        "binary.txt": b"ab\xff",
        "bad.jsonl": b'{"prompt": "a"}\n\n{"prompt": \n',
        "other.jsonl": b'{"text": "a"}\n',
        "long.txt": b"short\n" + 4000 * b"def ",
    }.items():
        (tmp_path / name).write_bytes(text)
    done = CliRunner().invoke(app, ["bench", *(a.format(folder=tmp_path) for a in arguments)], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert message.format(folder=tmp_path) in done.output


def test_a_draft_that_does_not_fit(saved: Path, tmp_path: Path) -> None:
    small = AutoConfig.from_pretrained(saved / "draft")
    small.vocab_size = 17
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    done = CliRunner().invoke(app, ["bench", "--draft", str(tmp_path / "small")], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "draft vocabulary 17 does not match target vocabulary 4096" in done.output


def test_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text('  def f():\n\n{"prompt": "x"}\n', encoding="utf-8")
    lines.write_text('{"prompt": "a\\nb", "n": 1}\n', encoding="utf-8")
    assert [prompt for _, prompt in inputs.read_prompts(text)] == ["  def f():", '{"prompt": "x"}']
    assert [prompt for _, prompt in inputs.read_prompts(lines)] == ["a\nb"]


# The verdict.


def way(name: str, *speeds: float, depth: int = 0, cost: float | None = None) -> Way:
    """A way of so many tokens a second in each round."""
    stats = None
    if name.startswith("specdec"):
        seconds = (
            {} if cost is None else {"draft_seconds": {4: {1: 4 * cost}}, "forward_seconds": {1: {1: 1.0, 5: 2.0}}}
        )
        stats = Stats(decisions=Decisions(depth, bool(depth), depth, **seconds))
    return Way(name, LABELS[name], 100, [100 / speed for speed in speeds], stats=stats)


LABELS = {
    "transformers": "transformers",
    "transformers_assisted": "transformers, assisted",
    "transformers_lookup": "transformers, prompt lookup",
    "specdec_plain": "specdec, no draft",
    "specdec_ngram": "specdec, n-grams",
    "specdec": "specdec, draft model",
}
GENERATE = way("transformers", 10, 10, 10)


def test_a_draft_that_does_not_pay() -> None:
    ways = [
        GENERATE,
        way("specdec_plain", 18),
        way("specdec_ngram", 24, depth=8),
        way("specdec", 17, depth=5, cost=0.6),
    ]
    found = verdict(ways)
    assert found.sentence == (
        "specdec, n-grams, depth 8: 2.4x generate(). This draft costs 0.6 of a target step a token and does not pay."
    )
    assert found.code == 'model = specdec.compile(model, draft="ngram", depth=8)'


def test_a_draft_that_pays() -> None:
    ways = [
        GENERATE,
        way("specdec_plain", 18),
        way("specdec_ngram", 20, depth=8),
        way("specdec", 30, depth=5, cost=0.1),
    ]
    found = verdict(ways)
    assert (
        found.sentence
        == "specdec, draft model, depth 5: 3.0x generate(). This draft costs 0.1 of a target step a token."
    )
    assert found.code == "model = specdec.compile(model, draft=draft, depth=5)"
    assert verdict(ways, two_tokenizers=True, compiled=False).code == (
        "model = specdec.compile(model, draft=draft, depth=5, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, "
        "compile=False)"
    )


def test_a_draft_that_pays_less_than_n_grams() -> None:
    ways = [GENERATE, way("specdec_plain", 15), way("specdec_ngram", 40, depth=8), way("specdec", 30, depth=5)]
    assert verdict(ways).sentence == (
        "specdec, n-grams, depth 8: 4.0x generate(). This draft makes specdec 2.0x as fast as without a draft."
    )


def test_what_is_not_told_apart_is_named() -> None:
    ways = [GENERATE, way("specdec_plain", 18, 20, 22, 24), way("specdec_ngram", 20, 22, 24, 26, depth=8)]
    found = verdict(ways)
    assert found.sentence.endswith("The difference to specdec, no draft is smaller than the noise of the rounds.")
    assert (
        "noise" not in verdict([GENERATE, way("specdec_plain", 18, 18), way("specdec_ngram", 20, 22, depth=8)]).sentence
    )


def test_nothing_is_faster() -> None:
    slower = verdict([GENERATE, way("specdec_plain", 8), way("specdec_ngram", 9, depth=8)])
    assert slower.sentence == (
        "Nothing is faster than generate(); specdec, n-grams, depth 8 comes closest, with 0.90x. "
        "Leave the model as it is."
    )
    noisy = verdict([way("transformers", 8, 10, 12, 14), way("specdec_plain", 9, 12, 13, 15)])
    assert noisy.sentence.startswith(
        "Nothing is faster than generate() beyond the noise of the rounds; specdec, no draft"
    )
    assert slower.code == noisy.code == ""


def test_transformers_may_win() -> None:
    ways = [GENERATE, way("transformers_assisted", 20), way("specdec_plain", 15), way("specdec", 12, depth=5)]
    found = verdict(ways)
    assert found.sentence == "transformers, assisted: 2.0x generate(). This draft does not pay."
    assert found.code == "out = model.generate(**inputs, assistant_model=draft)"
    found = verdict([GENERATE, way("transformers_lookup", 20), way("specdec_plain", 15)])
    assert found.code == "out = model.generate(**inputs, prompt_lookup_num_tokens=8)"


def test_noise_is_what_the_middle_half_spreads() -> None:
    measured = way("specdec_plain", 1, 10, 11, 12, 100)
    assert measured.speed == pytest.approx(11) and measured.middle == pytest.approx((10, 12))
    assert way("specdec_plain", 7).middle == pytest.approx((7, 7))
    assert way("specdec_plain", 13).is_faster(measured) and not way("specdec_plain", 11.5).is_faster(measured)
