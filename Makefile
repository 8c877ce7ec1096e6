# Everyday commands. The first one run makes .venv: it needs Python 3.10 or newer, a C++ compiler and a network. What is
# installed stands in constraints.txt, so that a commit does next month what it does today.
#
#   PYTHON           the interpreter .venv is made from; for `make gpu` and `make gpu-test`, the one they run with
#   TORCH_INDEX_URL  where torch comes from; without a GPU, https://download.pytorch.org/whl/cpu saves gigabytes
#   SIZES, PROMPTS   for `make bench`: targets of bundled,25m,100m,300m, and prompts decoded with each
#   OUT, SECTIONS    for `make gpu`: folder of the results, and which of its sections to run

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := .venv-oldest
NEWEST := .venv-newest
PIN := -c constraints.txt
SIZES ?= bundled,100m
PROMPTS ?= 4
OUT ?= bench/results/gpu
SECTIONS ?= correctness,roofs,decode,profile,products,batches,draft_1b

SHARED := -q -n logical --maxprocesses 8 --dist loadfile
STOLEN := $(SHARED:loadfile=worksteal)

INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))

.PHONY: demo test test-oldest test-newest bench docs lint gpu gpu-test gpu-there setup clean

demo: setup
	$(RUN) -m specdec demo

# The library; and the kernels: in Triton's interpreter, compiled ahead of time for GPUs that are not there, and as they
# run here. Files of tests are shared out among as many processes as there are cores, tests of kernels one by one.
test: setup $(VENV)/.torchao
	$(RUN) -m pytest $(SHARED) -m "not kernels and not aot and not torchao and not lowering"
	PYTHONPATH=$(VENV)/torchao $(RUN) -m pytest -q tests/test_torchao.py
	TRITON_INTERPRET=1 $(RUN) -m pytest $(STOLEN) -m "kernels and not aot"
	$(RUN) -m pytest $(STOLEN) -m aot
	$(RUN) -m pytest $(STOLEN) -m "kernels and not aot"

# The library with the oldest versions that pyproject.toml allows, in an environment of their own, and every step compiled
# for a GPU that is not there: what its torch makes of them is counted. Not part of `make test`: .ci/weekly runs it.
# Triton 3.6's interpreter needs a numpy below 2.4.
test-oldest: $(OLDEST)/.setup
	$(OLDEST)/bin/python -m pytest $(SHARED) -m "not kernels and not aot and not torchao and not lowering"
	$(OLDEST)/bin/python -m pytest -q -m lowering

# The same with the newest of everything that pip finds, each time anew.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade $(INDEX) torch
	$(NEWEST)/bin/python -m pip install --upgrade -e '.[test]'
	$(NEWEST)/bin/python -m pytest $(SHARED) -m "not kernels and not aot and not torchao and not lowering"

bench: setup
	@mkdir -p .benchmarks
	$(RUN) -m pytest bench/test_ops.py -q --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json .benchmarks/ops.json
	$(RUN) -m bench.ops_report .benchmarks/ops.json > bench/results/ops.md
	$(RUN) -m bench.end_to_end --sizes $(SIZES) --prompts $(PROMPTS)
	$(RUN) -m bench.backend --sizes $(SIZES)
	$(RUN) -m bench.verification

# The site: docs/ becomes site/, and a broken link is an error. The variable switches off an advertisement for another
# tool, which mkdocs-material prints.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --clean

lint: $(VENV)/.dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror kernels/csrc/*

# What a GPU does, in 7 minutes: whether it is right, then how fast (bench/gpu.py says what, and in which order). Nothing is
# installed: this runs with the torch that already drives the GPU. A step that does not compile is an error here: run
# eagerly, it would only be slow.
gpu: gpu-there
	SPECDEC_STRICT=1 PYTHONPATH=. $(PYTHON) -m bench.gpu --out $(OUT) --sections $(SECTIONS)

# Every test that needs a GPU, and the kernels' on it; they compile much, and take longer than that. The documents' tests,
# which the root's conftest.py makes, need sybil.
gpu-test: gpu-there
	SPECDEC_STRICT=1 PYTHONPATH=. $(PYTHON) -m pytest -q -m "(kernels or gpu) and not aot" --confcutdir=tests tests

gpu-there:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
		|| { echo "make: no CUDA device, or $(PYTHON) has no torch that sees it" >&2; exit 1; }
	@$(PYTHON) -c 'import rich, typer, matplotlib, transformers, safetensors' \
		|| { echo "make: $(PYTHON) lacks what the line above says; pip install specdec[cli] brings it" >&2; exit 1; }

setup: $(VENV)/.setup

# torch goes in first and on its own, so that nothing after it chooses another build.
$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "specdec needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIN) $(INDEX) torch
	$(RUN) -m pip install $(PIN) -e '.[test]'
	@touch $@

# Beside the environment: transformers imports it wherever it is found.
$(VENV)/.torchao: $(VENV)/.setup
	$(RUN) -m pip install $(PIN) --no-deps --target $(VENV)/torchao torchao
	@touch $@

$(OLDEST)/.setup: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install $(INDEX) torch==2.11.0
	$(OLDEST)/bin/python -m pip install -e '.[test]' torch==2.11.0 transformers==5.17.0 \
		'triton==3.6.0; sys_platform == "linux"' 'numpy<2.4'
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	$(RUN) -m pip install $(PIN) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist site *.egg-info .benchmarks .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
