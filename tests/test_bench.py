"""What the benchmarks share: cases whose ways do the same work, the loop of `bench.backend`, and the clock of a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import typer
from torch import Tensor

from bench import backend, cache_cases, cases, device_time, product_cases, tree_cases
from bench.case import Case
from bench.device_time import Timing
from specdec import zoo
from specdec.cli import measure
from specdec.graphs.passes import PASSES


def small_cases() -> list[Case]:
    """Every kind of case, small."""
    bf16 = torch.bfloat16
    return [
        *_small_attention(), cache_cases.append("25m", 2, 4, 64, bf16), cache_cases.commit("25m", 2, 3, 64, bf16),
        cases._top_support(2, 300, bf16), cases._row_law(2, 300, bf16, 50, 0.9), cases._row_law(2, 300, bf16),
        cases._draw(2, 300), *_small_trees(bf16),
        cases._ancestor_words(2, 5), product_cases.joined("25m", 3), product_cases.gated("25m", 3),
        product_cases.library("25m", "down", 3),
    ]  # fmt: skip


def _small_attention() -> list[Case]:
    return [
        cache_cases.attention("ragged_attention", "25m", 2, 4, 64, torch.float32),
        cache_cases.attention("tree_attention", "25m", 2, 4, 64, torch.float32),
        cache_cases.masked("25m", 2, 4, 64, torch.float32),
    ]


def _small_trees(dtype: torch.dtype) -> list[Case]:
    return [
        tree_cases.draw(2, (3, 2)), tree_cases.draw_of_logits(2, (3, 2), 300, dtype), tree_cases.greedy(2, (3, 2)),
        tree_cases.verify(2, (1, 1), 300, dtype), tree_cases.verify(2, (3, 2), 300, dtype, of_logits=True),
    ]  # fmt: skip


@pytest.mark.parametrize("case", _small_attention(), ids=str)
def test_ways_of_attention_compute_the_same(case: Case) -> None:
    """What is compared by the clock is the same work, in layouts of its own."""
    ways = case.ways(torch.device("cpu"))
    out = ways["op"]()
    torch.testing.assert_close(ways["reference"](), out)
    if case.op != "masked_attention":  # [T, H, D], beside PyTorch's [B, H, N, D]
        out = out.view(2, 4, *out.shape[1:]).transpose(1, 2)
    torch.testing.assert_close(ways["pytorch"](), out)


def test_layers_of_one_input_are_the_models() -> None:
    """25m: 8 query heads over 4 of keys and values, 64 numbers each; a gated unit."""
    x, weights, biases = product_cases.joined("25m", 3).ways(torch.device("cpu"))["op"].args
    assert ([len(weight) for weight in weights], biases) == ([512, 256, 256], [])
    case = product_cases.gated("25m", 3)
    rows, gate, up = case.ways(torch.device("cpu"))["op"].args
    assert gate.shape == up.shape and rows.shape == x.shape == (3, gate.shape[1])
    assert case.bytes == 2 * (gate.numel() + up.numel() + rows.numel() + 3 * len(gate))


def test_only_visible_keys_are_counted() -> None:
    """25m: 8 query heads over 4 of keys and values, 64 numbers each, float32."""
    ragged, tree, masked = _small_attention()
    entry, rows = 2 * 4 * 64 * 4, 2 * 2 * 4 * 8 * 64 * 4  # keys and values of a slot; queries and results
    assert tree.bytes == 2 * 63 * entry + rows
    assert ragged.bytes == tree.bytes + 2 * 4 * entry
    assert masked.bytes == 2 * 16 * entry + rows + 2 * 4 * 64


def _deviation(tokens: Tensor, laws: Tensor) -> float:
    """How far tokens [n] are from their laws [n, V], in standard deviations: how many are their law's best token, its
    second best, ... as far down as a hundred are expected. Counted by id, what a rule favours would cancel out."""
    ranks = laws.argsort(descending=True).argsort().gather(1, tokens[:, None])[:, 0]
    laws = laws.sort(descending=True)[0]
    expected, spread = laws.sum(0), (laws * (1 - laws)).sum(0).sqrt()
    deviations = (ranks.bincount(minlength=laws.shape[1]) - expected) / spread
    return deviations[expected > 100].abs().max().item()


def test_ways_of_verifying_trees_keep_the_targets_law() -> None:
    """The token after the root for both; node by node also the one after the first accepted."""
    torch.manual_seed(0)
    ways = tree_cases.verify(20000, (2, 2), 40, torch.float32).ways(torch.device("cpu"))
    target, _, tokens, *_ = ways["pytorch"].args
    _, _, _, (_, places, _, ids, *_), *_ = ways["op"].args
    drafted = {"op": ids[:, 0].gather(1, places[:, :2]), "pytorch": tokens}
    sample = torch.arange(20000)
    for way, drafts in drafted.items():
        path, n_accepted, bonus = ways[way]()
        child = drafts[sample, (path[:, 1] - 1).clamp(min=0)]
        assert torch.bincount(n_accepted, minlength=3).min() > 1000  # paths end everywhere
        assert _deviation(torch.where(n_accepted > 0, child, bonus), target[:, 0]) < 4.5
    end, n_more = path[:, 2], n_accepted - 1
    second = torch.where(n_more > 0, tokens[sample, end - 1], bonus)[n_more >= 0]
    assert _deviation(second, target[sample, path[:, 1]][n_more >= 0]) < 4.5


def test_trees_are_verified_alike_from_laws_and_from_logits() -> None:
    found: list[dict[str, Any]] = []
    for of_logits in (False, True):
        torch.manual_seed(0)
        ways = tree_cases.verify(64, (3, 2), 300, torch.float32, of_logits).ways(torch.device("cpu"))
        found.append({})
        for way, call in ways.items():
            torch.manual_seed(1)
            found[-1][way] = call()
    given, of = found
    for way, expected in (("op", "op"), ("pytorch", "pytorch"), ("op", "reference")):
        assert all(map(torch.equal, of[way], given[expected]))


def test_ways_of_drawing_children_and_of_a_greedy_walk_do_the_same_work() -> None:
    drawn = tree_cases.draw(4, (3, 2)).ways(torch.device("cpu"))
    assert torch.equal(drawn["op"](), drawn["reference"]())
    of_logits = tree_cases.draw_of_logits(4, (3, 3), 300, torch.bfloat16).ways(torch.device("cpu"))
    for children in (drawn["pytorch"](), of_logits["op"]()[0], of_logits["pytorch"]()[0]):
        assert children.shape == (16, 3)
        assert all(len(set(row)) == 3 for row in children.tolist())
    torch.manual_seed(0)
    walks = tree_cases.greedy(256, (2, 3, 1)).ways(torch.device("cpu"))
    path, n_accepted, bonus = walks["op"]()
    assert set(n_accepted.tolist()) == {0, 1, 2, 3}
    for way in ("reference", "pytorch"):
        assert all(map(torch.equal, walks[way](), (path, n_accepted, bonus)))


@torch.no_grad()
def test_a_loop_feeds_its_own_token_and_the_known_ones() -> None:
    model, _, tokenizer = measure.load_pair("bundled")
    prompts = zoo.held_out_prompts(tokenizer, 2, 8)
    fed: list[Tensor] = []

    def forward(input_ids: Tensor, **given: Any) -> Any:
        fed.append(input_ids)
        return model(input_ids=input_ids, **given)

    loop = backend.Loop(model, forward, prompts, 64)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, do_sample=False)[
        :, 8:
    ]
    text = loop(torch.empty(2, 6, dtype=torch.long), 1)
    assert torch.equal(torch.cat([loop.first, text], 1), expected)
    assert torch.equal(torch.cat(fed, 1), expected[:, :-1])
    fed.clear()
    assert torch.equal(loop(text, 3), text)  # from the prompt's end again
    assert [tuple(tokens.shape) for tokens in fed] == [(2, 3), (2, 3)]
    wrong = text.clone()
    wrong[:, 1] = 0
    assert torch.equal(loop(wrong, 3)[:, :2], text[:, :2])  # what follows the first token and the first draft
    assert not torch.equal(loop(wrong, 3), text)


def test_every_pass_is_measured_alone_and_recordings_on_a_gpu() -> None:
    assert list(backend.all_ways("cpu")) == ["transformers", "inductor", "specdec", *(f"only {p}" for p in PASSES)]
    more = set(backend.all_ways("cuda")) - set(backend.all_ways("cpu"))
    assert more == {"inductor, reduce-overhead", "specdec, reduce-overhead"}


def test_backends_that_write_other_tokens_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return lambda *given: [x.flip(-1) for x in gm(*given)]

    ways = {"transformers": None, "inductor": {"backend": "eager"}, "specdec": {"backend": wrong}}
    monkeypatch.setattr(backend, "all_ways", lambda device: ways)
    monkeypatch.setattr(backend, "FED", (1, 2))
    with pytest.raises(typer.Exit) as exit:
        backend.main("bundled", "1", "80", new_tokens=3, repeats=2, out=tmp_path)
    assert exit.value.exit_code == 1
    result = json.loads((tmp_path / "backend.json").read_text())
    assert result["settings"]["new_tokens"] == 4
    assert [entry["fed"] for entry in result["results"]] == [1, 2]
    for entry in result["results"]:
        same = {row["way"]: row["identical"] for row in entry["ways"]}
        assert same == {"transformers": True, "inductor": True, "specdec": False}
        assert next(row["ratio"] for row in entry["ways"] if row["way"] == "inductor") == 1
        assert all(len(row["milliseconds"]) == 2 and min(row["milliseconds"]) > 0 for row in entry["ways"])
    text = (tmp_path / "backend.md").read_text()
    for words in ("capacity 80, 1 token a call", "2 tokens a call", "| specdec |", "first 0%", "identical"):
        assert words in text
    with pytest.raises(typer.BadParameter, match="68 tokens do not fit"):
        backend.main("bundled", "1", "67", new_tokens=3, repeats=2, out=tmp_path)


class _Device:
    """What `device_time` asks of CUDA: work is done at once, or kept for replays while a graph records it.

    A call costs one of `milliseconds` in turn, and nothing if its inputs are in the cache.
    """

    def __init__(self, milliseconds: list[float]) -> None:
        self.milliseconds = cycle(milliseconds)
        self.now, self.is_cold, self.is_compiled = 0.0, False, False
        self.recorded: list[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        work() if self.recorded is None else self.recorded.append(work)

    def call(self) -> None:
        if self.recorded is not None and not self.is_compiled:
            raise RuntimeError("not permitted when stream is capturing\nand more")
        self.is_compiled = True
        self.do(self._run)

    def _run(self) -> None:
        self.now, self.is_cold = self.now + next(self.milliseconds) * self.is_cold, False

    def get_empty_cache_for_benchmark(self) -> str:
        return "buffer"

    def clear_cache(self, buffer: str) -> None:
        self.do(self._clear)

    def _clear(self) -> None:
        self.now, self.is_cold = self.now + 100, True

    @contextmanager
    def graph(self, graph: _Graph, **_: object) -> Iterator[None]:
        self.recorded = graph.work
        yield
        self.recorded = None


class _Graph:
    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for work in self.work:
            work()


class _Event:
    def __init__(self, device: _Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.device.do(self._note)

    def _note(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], _Device]:
    """A device whose calls take so many milliseconds, in place of CUDA; started call by call they take 5."""

    def make(milliseconds: list[float]) -> _Device:
        device = _Device(milliseconds)
        stand_ins = {
            "CUDAGraph": _Graph, "Event": lambda **_: _Event(device), "graph": device.graph, "stream": nullcontext,
            "current_stream": lambda: None, "synchronize": lambda: None,
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=device))
        monkeypatch.setattr(triton.testing, "do_bench", lambda *_, **__: 5.0)
        return device

    return make


def test_calls_are_timed_in_a_graph_with_a_cold_cache(device_of: Callable[[list[float]], _Device]) -> None:
    assert device_time.time_call(device_of([3, 7, 3]).call) == Timing(pytest.approx(0.003), "")


def test_calls_that_no_graph_can_record_are_timed_one_by_one(device_of: Callable[[list[float]], _Device]) -> None:
    device = device_of([3])

    def reads() -> None:
        device.is_compiled = False
        device.call()

    note = "started by the host each time: not permitted when stream is capturing"
    assert device_time.time_call(reads) == Timing(0.005, note)
