"""What a script sets for all of torch (default dtype and device, deterministic mode, threads, grad modes, autocast,
modes) changes no text, or runs transformers' own loop; numbers that C++ reads have the dtypes that it reads."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ambient_world
import pytest
import torch
from ambient_world import ALONE, COMPILED, DRAFTS, SETTINGS, Made
from side_by_side import Prompts, Tiny, same, wrap
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import specdec
from specdec.hf import names
from specdec.hf.laws import law_of
from specdec.hf.view import ModelView
from specdec.kernels.attention.masked_attention import masked_attention_cpu
from specdec.kernels.cpu import address, bind
from specdec.kernels.linear.skinny_linear import skinny_linear_cpu
from specdec.kernels.sampling.noise import uniform_cpu

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("specdec", "kernels"), ("specdec", "graphs")

# What the sources say.

MAKERS = {f"torch.{function.__name__}" for function in _device_constructors()}  # all that torch itself knows of
THE_USERS_OWN = {  # numbers, whose dtype is looked at
    "specdec/batching.py": {"torch.as_tensor"}, "specdec/engine/seeds.py": {"torch.as_tensor"},
}  # fmt: skip
# Checks it; makes a table; compare it.
POINTERS = {"kernels/cpu.py", "kernels/cache/kv_cache.py", "specdec/engine/memory.py", "specdec/hf/twin.py"}


def faults(source: str, users_own: set[str]) -> Iterator[str]:
    """What in a source leaves a dtype or a device to torch's defaults."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            is_fault = any(f"torch.{name.name}" in MAKERS for name in node.names)
        elif isinstance(node, ast.Import):
            is_fault = any(name.name == "torch" and name.asname for name in node.names)
        elif isinstance(node, ast.Call):
            is_fault = _leaves_a_default(node, users_own)
        else:
            continue
        if is_fault:
            yield ast.unparse(node)


def _leaves_a_default(call: ast.Call, users_own: set[str]) -> bool:
    made, given = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
    if made == "torch.Generator":
        return not call.args and "device" not in given
    if made == "torch.where":
        return len(call.args) == 3 and all(map(_is_number, call.args[1:]))
    return made in MAKERS and not ({"device"} if made in users_own else {"dtype", "device"}) <= given


def _is_number(node: ast.expr) -> bool:
    """Whether an expression is a number of Python's, whose dtype in a tensor is the default."""
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in {"float", "int"}
    return isinstance(node, ast.Constant) or ast.unparse(node) in {"torch.inf", "torch.nan", "math.inf", "math.nan"}


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3, dtype=torch.int64)", "torch.zeros(3, device=x.device)", "torch.full((), 1.0)", "torch.eye(3)",
        "torch.tril_indices(3, 3)", "torch.tensor(knobs, device=x.device)", "torch.randint(9, ())",
        "torch.as_tensor(x, device='cpu')", "torch.Generator()", "from torch import arange", "import torch as t",
        "torch.where(x > 0, 0.0, float('-inf'))", "torch.where(x > 0, 1, -torch.inf)",
    ],
)  # fmt: skip
def test_a_default_is_seen(line: str) -> None:
    assert list(faults(line, set())) == [line]


def test_tensors_are_made_with_a_dtype_and_a_device() -> None:
    """Of their own: torch's defaults are the user's. And no address is taken but where it is checked."""
    found, n_made = [], 0
    for path in (path for folder in ("kernels", "graphs", "specdec") for path in (ROOT / folder).rglob("*.py")):
        if path.relative_to(ROOT).parts[:2] in LINKS:
            continue
        name, source = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        found += [f"{name}: {fault}" for fault in faults(source, THE_USERS_OWN.get(name, set()))]
        found += [f"{name} takes addresses"] if ".data_ptr()" in source and name not in POINTERS else []
        n_made += sum(source.count(f"{maker}(") for maker in MAKERS)
    assert n_made > 50
    assert found == []


def test_what_a_kernel_cannot_read_is_refused(tmp_path: Path) -> None:
    """By whoever hands it its address."""
    good = torch.zeros(4, 3, dtype=torch.float32, device="cpu")
    bad = good.double(), good.long(), good.to("meta"), good.t()
    assert address(good, torch.float32) == good.data_ptr()
    source = '#include "common.h"\nextern "C" void kernel(const float* x, int64_t* y) { y[0] = int64_t(x[0]); }'
    (tmp_path / "first.cpp").write_text(source)
    kernel = bind(str(tmp_path / "first.cpp"), "float*, int64_t*")
    out = torch.zeros(1, dtype=torch.int64, device="cpu")
    kernel(good + 2, out)
    assert out.tolist() == [2]
    for x in bad:
        with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.float32 on a CPU, got"):
            address(x, torch.float32)
        with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.float32 on a CPU, got"):
            kernel(x, out)
    with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.int64"):
        kernel(good, out.int())
    with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.int64"):
        uniform_cpu(out.int(), out, out, 0)
    with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.float32"):
        skinny_linear_cpu(good, good.double())
    with pytest.raises(TypeError, match=r"a kernel reads contiguous torch\.float32"):
        skinny_linear_cpu(good, torch.zeros(3, 5, dtype=torch.float32, device="cpu").t())
    q = torch.zeros(1, 2, 3, 4, dtype=torch.float32, device="cpu")
    mask = torch.zeros(3, 3, dtype=torch.bool, device="cpu")
    for case in (
        (q, q.double(), q, mask), (q, q, q.bfloat16(), mask), (q.half(), q, q, mask), (q, q, q, mask.long()),
        (q, q, q, mask.double()), (q, q, q, mask.to("meta")), (q, q.to("meta"), q, mask),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="a kernel reads contiguous torch"):
            masked_attention_cpu(*case, 1.0)


# What comes out.


@pytest.fixture(scope="module")
def world() -> dict[str, str | None]:
    """What is wrong under each setting, or None."""
    done = subprocess.run(
        [sys.executable, ambient_world.__file__], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    told = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return told | {"the end": f"{done.returncode}: {done.stderr[-2000:]}" if done.returncode else None}


@pytest.mark.parametrize("draft", [*DRAFTS, "afterwards"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_do_not_depend_on_it(setting: str, draft: str, world: dict[str, str | None]) -> None:
    """Greedy ones are transformers' under the same setting, seeds give those of before."""
    assert world.get(f"{setting}, {draft}", world["the end"]) is None


@pytest.mark.parametrize("what", [ALONE, *(f"{COMPILED}: {dtype}" for dtype in (torch.float32, torch.bfloat16))])
def test_steps(what: str, world: dict[str, str | None]) -> None:
    assert world.get(what, world["the end"]) is None


def test_nobody_ended_it(world: dict[str, str | None]) -> None:
    assert world["the end"] is None


def test_tensors_of_a_dtype_are_seen() -> None:
    with Made(torch.float16) as made:
        torch.zeros(3, dtype=torch.float32, device="cpu").half()
    assert len(made.found) == 1


# What is taken for granted, and what cannot be.


@pytest.mark.parametrize("setting", ["float64", "with meta", "deterministic", "precision"])
def test_a_view_holds_for_the_settings_it_was_made_under(setting: str, model: PreTrainedModel) -> None:
    """Its proof and its compiled steps."""
    view = ModelView(model)
    with SETTINGS[setting]():
        assert not view.is_current
    assert view.is_current


def test_a_refusal_holds_for_the_settings_it_was_made_under(fresh: Tiny, prompts: Prompts) -> None:
    class Fails(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + torch.zeros(1)

    model = fresh("llama")
    model.lm_head = Fails(model.config.hidden_size, model.config.vocab_size, bias=False)
    wrapped, inputs = wrap(model), prompts([5, 3])
    with torch.device("meta"):
        with pytest.raises(RuntimeError) as theirs:
            model.generate(**inputs, max_new_tokens=5)
        with (
            pytest.raises(RuntimeError) as ours,
            pytest.warns(specdec.SpecdecWarning, match="its forward fails"),
        ):
            wrapped.generate(**inputs, max_new_tokens=5)
    assert str(ours.value) == str(theirs.value)
    same(wrapped, model, **inputs, max_new_tokens=5)
    assert wrapped.specdec.stats.fallbacks.total() == 1


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.roll(1, -1) if func is torch.ops.aten.mm.default and out.shape[-1] == 97 else out


@pytest.mark.parametrize("mode", [BaseTorchFunctionMode, _Dispatch])
def test_modes_see_what_transformers_loop_does(mode: type, model: PreTrainedModel, prompts: Prompts) -> None:
    wrapped, inputs = wrap(model), prompts([5, 3])
    with mode():
        expected = model.generate(**inputs, max_new_tokens=5)
        with pytest.warns(specdec.SpecdecWarning, match=f"every operation of torch's: {mode.__name__}"):
            assert torch.equal(wrapped.generate(**inputs, max_new_tokens=5), expected)
    same(wrapped, model, **inputs, max_new_tokens=5)


def test_autocast_between_two_results(model: PreTrainedModel, prompts: Prompts) -> None:
    """Texts that are being decoded go on as they began; the prompts of a call under autocast run transformers' loop."""
    texts = [torch.arange(2, 9 + n, dtype=torch.int64) for n in range(3)]
    expected = [model.generate(ids[None], max_new_tokens=6)[0] for ids in texts]
    wrapped = wrap(model)
    results = specdec.generate_many(wrapped, texts, max_batch_size=1, max_new_tokens=6, progress=False)
    found = [next(results)]
    with torch.autocast("cpu", torch.bfloat16):
        found += results
        with pytest.warns(specdec.SpecdecWarning, match="autocast"):
            under = wrapped.generate(**prompts([5]), max_new_tokens=6)
        assert torch.equal(under, model.generate(**prompts([5]), max_new_tokens=6))
    assert all(torch.equal(result.tokens, ids) for result, ids in zip(found, expected, strict=True))
    assert list(wrapped.specdec.stats.fallbacks) == ["autocast"]


def test_a_law_is_of_no_inference_mode() -> None:
    """Or steps would compile once more for it."""
    with torch.inference_mode():
        processors = [names.processor("TemperatureLogitsWarper")(0.8), names.processor("TopPLogitsWarper")(0.9)]
        law = law_of(processors, True, torch.device("cpu"))
    assert len(law.tensors()) == 3
    assert not any(tensor.is_inference() for tensor in law.tensors())
