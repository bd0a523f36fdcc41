# The first two are all that a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# On machines without an NVIDIA GPU a CPU build is enough, e.g.
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml

# Releases of transformers that are tested beside the newest, and the tests that a release matters for.
OLDER_TRANSFORMERS := 4.57 4.48
VERSION_TESTS := tests/models tests/patch tests/api tests/integrations tests/test_readme.py \
	-k "not (any_shape or any_one_weight or long_notes or precision_apart or torch_backend or TestCompile)"

.PHONY: demo test test-versions test-quantized lint bench bench-ops cubins triton-check cuda-check gpu-check gpu-compare \
	clean

demo: $(VENV)/.demo
	$(BIN)/python -m clinfast.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q

# Side by side, each on one thread.
test-versions: $(OLDER_TRANSFORMERS:%=$(VENV)-transformers-%/.ready) $(VENV)-quantized/.ready
	$(MAKE) --no-print-directory -j2 --output-sync=target $(OLDER_TRANSFORMERS:%=test-transformers-%) test-quantized

test-quantized: $(VENV)-quantized/.ready
	OMP_NUM_THREADS=1 $(VENV)-quantized/bin/python -m pytest -q -p no:cacheprovider tests/patch/test_quantized.py

test-transformers-%: $(VENV)-transformers-%/.ready
	OMP_NUM_THREADS=1 $(VENV)-transformers-$*/bin/python -m pytest -q -p no:cacheprovider $(VERSION_TESTS)

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
	$(BIN)/python -m pytest -q -m exhaustive tests/triton_backend

# Needs nvcc and no GPU: every CUDA kernel for every architecture, with registers and shared memory.
cuda-check:
	cd tests/cuda && $(PYTHON) -m compile_check

# For a machine with an NVIDIA GPU; uses the Python packages that are there, and no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# What gpu-check measured, against the committed baseline of the same card. Fails where one is slower, and where there
# is no baseline: `python -m benchmarks.compare keep benchmarks/results/gpu/models.json` makes one.
gpu-compare:
	$(PYTHON) -m benchmarks.compare check benchmarks/results/gpu/models.json

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

# An environment of its own that sees the packages of $(VENV), with others put before them.
define beside
$(BIN)/python -m venv $(@D)
here=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
there=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
echo "import site; site.addsitedir('$$there')" > $$here/packages_of_the_newest.pth
$(@D)/bin/python -m pip install -q --disable-pip-version-check $(1)
touch $@
endef

.PRECIOUS: $(VENV)-transformers-%/.ready
$(VENV)-transformers-%/.ready: $(VENV)/.test
	$(call beside,"transformers==$*.*" sentence-transformers peft accelerate)

# Apart from $(VENV): where torchao is installed, transformers imports it, which takes seconds and prints.
$(VENV)-quantized/.ready: $(VENV)/.test
	$(call beside,torchao bitsandbytes)

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[bench,peers]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-transformers-* $(VENV)-quantized build *.egg-info clinfast/_C*.so
