# Each target makes .venv by itself. PYTHON chooses the interpreter that it is made with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_EXTRA)
# What pip does, a line a package: not the hundred lines on what is there already. A failure stays one: pipefail.
SHOW := | awk '/^ *(Downloading|Using cached|Processing|Installing|Successfully)/ { print; fflush() }'
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo train test test-gpu lint bench bench-kernels bench-gpu clean

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py

train: $(VENV)/.installed
	$(RUN) scripts/train.py $(ARGS)

# One process a core, four at most. In one process: make test ARGS="-n 0 -x tests/test_lora.py", or plain pytest.
test: $(VENV)/.installed-test
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# On a machine with a GPU: the kernels, compiled and run there, in one process.
test-gpu: $(VENV)/.installed-test
	$(RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA device')"
	$(RUN) -m pytest -rs tests/test_nf4.py tests/test_nf4_layer.py tests/test_nf4_triton.py tests/test_nf4_cuda.py tests/test_ops_triton.py tests/test_replay.py $(ARGS)

lint: $(VENV)/.installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed-test
	$(RUN) scripts/bench_train.py $(ARGS)

bench-kernels: $(VENV)/.installed-test
	$(RUN) scripts/bench_kernels.py $(ARGS)

# On a machine with a GPU: tokens/s of a Mistral-7B shape, and the share of what its memory allows.
bench-gpu: $(VENV)/.installed-test
	$(RUN) scripts/bench_generate.py --model mistral-7b-shape --device cuda --quantize nf4 --modes greedy $(ARGS)
	$(RUN) scripts/bench_generate.py --model mistral-7b-shape --device cuda --modes greedy $(ARGS)

# torch first and by itself. Where the index has builds with CUDA only, they are gigabytes: PIP_EXTRA="--index-url URL"
# takes another index, such as PyTorch's for CPUs.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	@echo "Installing into $(VENV): torch first, which is large. This takes a minute or a few."
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) "setuptools>=64" wheel "$$(grep '^torch==' constraints.txt)" $(SHOW)
	@$(PIP) --no-build-isolation --editable . $(SHOW)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests compare with: transformers, PEFT, bitsandbytes and others."
	@$(PIP) --no-build-isolation --editable ".[test]" $(SHOW)
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable ".[lint]" $(SHOW)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
