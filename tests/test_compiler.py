"""A C++ compiler that does not work, or stops working: everything runs in PyTorch, with one warning that says why."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor, fx
from torch._dynamo.exc import SkipFrame
from torch._inductor.exc import CppCompileError

from specdec.engine.stats import Stats
from specdec.errors import SpecdecWarning
from specdec.graphs import backend
from specdec.graphs.compiled import CompiledSteps
from specdec.hf.cache import Way
from specdec.kernels import cpu
from specdec.kernels.attention import masked_attention, ragged_attention
from specdec.kernels.library import OPS
from specdec.kernels.linear import skinny_linear
from specdec.kernels.sampling import draw, noise

CSRC = Path(cpu.__file__).with_name("csrc")
MISSING = "x.cpp:1:10: fatal error: omp.h: No such file or directory"

# What is imported is shared: a child a case. Inductor reads CXX when it is imported, which is before.
_CODE = """
import json, os, sys, warnings
import torch
from families import make_tiny
import specdec.api

torch.set_num_threads(1)
model, draft, folder = make_tiny("llama"), make_tiny("llama", seed=7, num_hidden_layers=1), sys.argv[1]
ids = torch.arange(1, 9, dtype=torch.int64)[None]
settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
expected = model.generate(ids, do_sample=False, **settings)
for name, (compiler, cache) in json.loads(sys.argv[2]).items():
    if not (child := os.fork()):
        os.environ |= {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": cache}
        torch._inductor.config.cpp.cxx = (None, compiler)
        wrapped = specdec.api.compile(model, draft, depth=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            same = torch.equal(wrapped.generate(ids, do_sample=False, **settings), expected)
            wrapped.generate(ids, do_sample=True, top_k=0, **settings)
        said = [str(w.message) for w in caught if issubclass(w.category, specdec.errors.SpecdecWarning)]
        stats = wrapped.specdec.stats
        result = [same, said, dict(stats.eager), dict(stats.fallbacks), str(stats)]
        open(f"{folder}/{name}.json", "w").write(json.dumps(result))
        os._exit(0)
    os.waitpid(child, 0)
"""


def _script(folder: Path, name: str, at_sources: str) -> str:
    """A compiler that knows its version, and does something else with what it should compile."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nfor a in "$@"; do case $a in *.cpp|*.h) {at_sources};; esac; done\nexec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_broken_compiler_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fresh = {name: str(tmp_path / f"cache {name}") for name in ("absent", "fails", "headers", "killed")}
    cases = {
        "absent": ("/no/such/g++", fresh["absent"], "No working C++ compiler"),
        "fails": ("/bin/false", fresh["fails"], "No working C++ compiler"),
        "headers": (
            _script(tmp_path, "g++h", f"echo '{MISSING}' >&2; exit 1"),
            fresh["headers"],
            "omp.h: No such file",
        ),
        "killed": (_script(tmp_path, "g++k", "kill -9 $$"), fresh["killed"], "CppCompileError"),
        "cache": ("g++", str(tmp_path / "file" / "cache"), "Not a directory"),
    }
    given = json.dumps({name: (compiler, cache) for name, (compiler, cache, _) in cases.items()})
    command = [sys.executable, "-c", _CODE, str(tmp_path), given]
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here}:{here.parent}:{':'.join(sys.path[1:])}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (compiler, _, words) in cases.items():
        assert (tmp_path / f"{name}.json").exists(), f"{name}: {done.stderr}"
        is_same, said, eager, fallbacks, table = json.loads((tmp_path / f"{name}.json").read_text())
        assert is_same and not fallbacks
        (message,) = said
        assert message.startswith("specdec could not compile a step") and "\n" not in message
        assert compiler in message and words in message
        (reason,) = eager
        assert eager[reason] > 4 and "ran eagerly" in table


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out about the compiler is forgotten."""
    assert cpu.has_compiler()
    monkeypatch.setattr(cpu._Toolchain, "error", None)


def test_an_edited_header_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor looks at the text that it is handed: all of it is there, once."""
    monkeypatch.setattr(cpu, "_CSRC", tmp_path)
    files = {
        "a.h": "#pragma once\nint a;\n",
        "b.h": '#pragma once\n#include "a.h"\nint b;\n',
        "c.cpp": '#include "a.h"\n#include "b.h"\n#include <cmath>\nint c;\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu.source_of("c.cpp") == "int a;\nint b;\n#include <cmath>\nint c;\n"
    (tmp_path / "a.h").write_text("int other;\n")
    assert cpu.source_of("c.cpp") == "int other;\nint b;\n#include <cmath>\nint c;\n"


@pytest.mark.parametrize("path", sorted(CSRC.iterdir()), ids=lambda path: path.name)
def test_a_file_is_understood_by_itself(path: Path) -> None:
    """As an editor reads it."""
    command = [cpu.compiler_name(), "-x", "c++", "-std=c++17", "-fopenmp", "-fsyntax-only", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_not_built_once_is_not_tried_again(working: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

    tried: list[str] = []

    def fail(*_: Any) -> None:
        tried.append("")
        raise CppCompileError(["g++"], f"In file included from x\n{MISSING}\ncompilation terminated.")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", fail)
    assert cpu.build("uniform.cpp", "f", ()) is None
    assert cpu.bind("trial.cpp", "int64_t") is None and cpu.build("draw.cpp", "f", ()) is None
    assert len(tried) == 1
    assert cpu.compiler_error() == f"{cpu.compiler_name()}: CppCompileError: {MISSING}"
    assert not cpu.has_kernels(torch.ones(1, dtype=torch.float32))


def test_a_compiler_that_computes_wrongly_is_none(
    working: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.cpp").write_text((CSRC / cpu._TRIAL).read_text().replace("2 * x[i]", "3 * x[i]"))
    monkeypatch.setattr(cpu, "_TRIAL", str(tmp_path / "wrong.cpp"))
    cpu._try.__wrapped__()
    assert "computes [0.0, 3.0, 6.0]" in str(cpu.compiler_error())


class _Adder:
    """A step: it changes its argument in place."""

    def add(self, x: Tensor) -> Tensor:
        x += 1
        return x * 2

    def noise(self, x: Tensor) -> Tensor:
        x += 1
        seed = torch.zeros_like(x, dtype=torch.int64)
        return noise.uniform(seed, seed, seed, 0)


Backend = Callable[..., Any]


def _run(function: Callable[[Tensor], Tensor], stats: Stats, size: int = 3) -> Callable[[], Tensor]:
    steps = CompiledSteps(True, stats.eager)

    def run(size: int = size) -> Tensor:
        x = torch.zeros(size, dtype=torch.float32)
        steps.get(function, "key", size)(x)
        return x

    return run


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (BrokenProcessPool("a worker died"), "a worker died"),
        (CppCompileError(["g++"], MISSING), "omp.h"),
        (FileNotFoundError("cc1plus"), "cc1plus"),
    ],
)
def test_what_can_not_be_compiled_runs_once_and_eagerly(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(backend, "specdec", fail)
    stats = Stats()
    run = _run(_Adder().add, stats)
    with pytest.warns(SpecdecWarning, match=f"specdec could not compile a step; .*{words}"):
        assert run().tolist() == [1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run().tolist() == [1, 1, 1]
    assert dict(stats.eager) == {f"a step could not be compiled ({type(error).__name__})": 2}
    assert stats.to_dict()["eager"] == dict(stats.eager)
    stats.reset()  # steps go on to count in it
    assert run().tolist() == [1, 1, 1]
    assert stats.eager.total() == 1
    assert "ran eagerly" in str(stats)
    monkeypatch.setenv("SPECDEC_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"specdec could not compile a step: .*{words}"):
        _run(_Adder().add, Stats())()


def test_what_dynamo_would_leave_out_without_a_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor asks it to where a GPU knows no bfloat16: then each function that is called compiles by itself."""

    def skip(*_: Any, **__: Any) -> None:
        raise SkipFrame("BF16 is not supported")

    monkeypatch.setattr(backend, "specdec", skip)
    stats = Stats()
    with pytest.warns(SpecdecWarning, match="specdec could not compile a step; .*BF16 is not supported"):
        assert _run(_Adder().add, stats)().tolist() == [1, 1, 1]
    assert sum(stats.eager.values()) == 1
    monkeypatch.setenv("SPECDEC_STRICT", "1")
    with pytest.raises(RuntimeError, match="BF16 is not supported"):
        _run(_Adder().add, Stats())()


def _plain(gm: fx.GraphModule, *_: Any, **__: Any) -> Backend:
    return gm.forward


def test_a_failure_of_the_step_itself_is_raised_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, dtype=torch.float32)

    def half(gm: fx.GraphModule, *_: Any, **__: Any) -> Backend:
        def run(*arguments: Any) -> None:
            gm(*arguments)
            raise OSError("in the middle")

        return run

    monkeypatch.setattr(backend, "specdec", half)
    stats = Stats()
    with warnings.catch_warnings(), pytest.raises(OSError, match="in the middle"):
        warnings.simplefilter("error")
        CompiledSteps(True, stats.eager).get(_Adder().add, "key", 3)(x)
    assert x.tolist() == [1, 1, 1] and not stats.eager


def test_a_later_shape_that_can_not_be_compiled_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    run = _run(_Adder().add, stats)
    monkeypatch.setattr(backend, "specdec", _plain)
    assert run(3).tolist() == [1, 1, 1] and not stats.eager

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backend, "specdec", full)
    with pytest.warns(SpecdecWarning, match="No space left on device"):
        assert run(5).tolist() == [1] * 5
    assert run(3).tolist() == [1] * 3 and sum(stats.eager.values()) == 2


def test_no_graph_runs_whose_kernels_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "specdec", _plain)
    monkeypatch.setitem(OPS, "uniform", replace(OPS["uniform"], kernel=lambda: None))
    stats = Stats()
    with pytest.warns(SpecdecWarning, match="specdec could not compile a step"):
        assert _run(_Adder().noise, stats)().tolist() == [1, 1, 1]
    assert sum(stats.eager.values()) == 1


def test_ops_whose_kernel_can_not_be_built_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the kernel's result: a compiled graph relies on it."""
    torch.manual_seed(0)
    x, weight, q, k = (torch.randn(shape) for shape in ((3, 8), (5, 8), (2, 4, 3, 8), (2, 2, 6, 8)))
    mask = torch.rand(2, 1, 3, 6) > 0.5
    mask[1, 0, 1] = False  # sees nothing
    keys = [torch.arange(3) for _ in "abc"]
    calls: list[tuple[Any, str, Callable[..., Tensor], tuple[Any, ...]]] = [
        (skinny_linear, "_kernel", skinny_linear.skinny_linear_cpu, (x, weight)),
        (masked_attention, "_kernel", masked_attention.masked_attention_cpu, (q, k, k, mask, 0.3)),
        (noise, "_cpp", noise.uniform_cpu, (*keys, 0)),
        (draw, "_cpp", draw.draw_cpu, (x.abs(), *keys, 0)),
    ]
    for module, kernel, op, arguments in calls:
        expected = op(*arguments)
        monkeypatch.setattr(module, kernel, lambda: None)
        found = op(*arguments)
        torch.testing.assert_close(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())


def test_a_model_whose_attention_is_not_built_decodes_the_same(
    tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged_attention, "_kernel", lambda: None)
    model = tiny("llama")
    wrapped = wrap(model)
    same(wrapped, model, **prompts(RAGGED), max_new_tokens=6)
    assert wrapped.specdec._decoders.get("ngram").target.cache.way is not Way.FUSED
