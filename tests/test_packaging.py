"""The package holds together: its links, its version, and imports that cost nothing and break nobody else's."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = [name for name in ("kernels", "graphs") if list((ROOT / name).glob("*.py"))]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def run(code: str) -> str:
    """What a fresh interpreter prints for `code` when started in the repository root."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files() -> list[Path]:
    """Every file under specdec/, those behind the links included."""
    return [Path(folder, f) for folder, _, names in os.walk(ROOT / "specdec", followlinks=True) for f in names]


def modules() -> list[str]:
    """The name of every module under specdec/."""
    dotted = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files() if f.suffix == ".py")
    return sorted(name.removesuffix(".__init__") for name in dotted)


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_resolves(name):
    link = ROOT / "specdec" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert list(link.glob("*.py"))


@pytest.mark.parametrize("name", LINKED)
def test_repository_root_offers_no_regular_package(name):
    """A regular package `kernels` here would shadow Hugging Face's, which transformers probes at import."""
    assert not (ROOT / name / "__init__.py").exists()
    origin = run(f"import importlib.util as u; spec = u.find_spec('{name}'); print(spec and spec.origin)")
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / name)


def test_transformers_imports_from_the_repository_root():
    assert run("from transformers import AutoModelForCausalLM, LlamaForCausalLM as m; print(m.__name__)").endswith(
        "LlamaForCausalLM"
    )


def test_importing_specdec_is_light():
    heavy = ["triton", "torch._inductor", "torch._dynamo", "matplotlib", "transformers.modeling_utils"]
    assert run(f"import sys, specdec; print([m for m in {heavy} if m in sys.modules])") == "[]"


WITHOUT_CLI = """
import sys
for name in ("rich", "typer", "matplotlib"):
    sys.modules[name] = None
import torch, specdec
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
plain = LlamaForCausalLM(config).eval()
model, ids = specdec.compile(plain, "ngram", compile=False), torch.tensor([[1, 2, 3, 1, 2]])
"""


def test_the_library_works_without_what_the_command_line_needs():
    code = """
a, b = (m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0) for m in (plain, model))
assert torch.equal(a, b) and model.specdec.stats.decoded == 1
print(model.specdec.stats)
try:
    model.specdec.stats.plot("never.png")
except ImportError as error:
    print(error)
"""
    *lines, error = run(WITHOUT_CLI + code).splitlines()
    assert lines[0].startswith("new tokens                  8 in ")
    assert error == "a plot needs matplotlib: pip install 'specdec[cli]'"


def test_progress_is_silent_without_rich():
    code = """
settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
for result in specdec.generate_many(model, [ids[0], ids[0, :2]], max_batch_size=2, progress=True, **settings):
    print(len(result.tokens))
model.specdec.warmup(max_length=16)
"""
    assert run(WITHOUT_CLI + code).split() == ["13", "10"]


def test_the_command_line_says_what_it_lacks():
    code = """
import sys
sys.modules["typer"] = None
from specdec.__main__ import main
try:
    main()
except SystemExit as exit:
    print(exit.code)
"""
    assert run(code) == "specdec: the command line needs typer: pip install 'specdec[cli]'"


def test_importing_every_module_does_no_work():
    """Not a word, no CUDA context, no random number drawn, no default changed."""
    code = f"""
import importlib, torch
import transformers.modeling_utils
def state():
    return (torch.get_rng_state().sum().item(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.cuda.is_initialized())
before = state()
for name in {modules()}:
    importlib.import_module(name)
assert state() == before, (before, state())
"""
    assert run(code) == ""


def test_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert run("import specdec; print(specdec.__version__)") == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_that_is_installed_by_name_is_pinned():
    """`make` installs what constraints.txt says, exactly; pip itself leaves the rest to ranges."""
    asked = {re.match(r"[\w-]+", line)[0] for line in metadata.requires("specdec")} - {"specdec"}
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)(?:;.*)?$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "transformers", "scipy", "ruff"} <= asked
    assert asked <= pins.keys()
    assert "torchao" in pins


def test_every_data_file_is_packaged():
    patterns = re.search(r'^"\*" = \[(.+)\]$', PYPROJECT, re.MULTILINE)[1]
    data = {f.suffix or f.name for f in files() if f.suffix != ".py" and "__pycache__" not in f.parts}
    assert {".cpp", ".h", ".safetensors"} <= data
    assert {s for s in data if f'{s}"' not in patterns} == set()
