# The first two are all that a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# On machines without an NVIDIA GPU a CPU build is enough, e.g.
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint bench bench-ops cubins triton-check gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/python -m clinfast.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q

lint: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check "ruff>=0.8" "mypy>=1.13"
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks run --json benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks applications --json benchmarks/results/cpu.json

bench-ops: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/ops

# The Triton kernels as machine code in the package, so that no compiler is needed where they run. No GPU needed.
cubins: $(VENV)/.test
	$(BIN)/python -m clinfast.triton_kernels.build

# Every configuration of the tuning tables, compiled for every class of devices: ten minutes.
triton-check: $(VENV)/.test
	$(BIN)/python -m pytest -q -m exhaustive tests/triton

# For a machine with an NVIDIA GPU; uses the Python packages that are there, and no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench,peers]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info clinfast/_C*.so
