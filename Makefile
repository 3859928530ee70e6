# Everything a clone needs, from one command each: Python >= 3.10, a C++ compiler and, for the CUDA module, nvcc.
# The first command makes .venv and installs what it needs there; later ones start at once.
#
#   make demo                 train a small model on handwritten digits, sample from it, measure (5 minutes)
#   make test                 the tests, against the installed wheel: minutes   ARGS="-k step"
#   make test-all             all that CI runs of them
#   make test-long            what CI does not run: hundreds of millions of draws, seeded faults, pictures, the four below
#   make fuzz                 every op, public function and command with random arguments: hours   FUZZ=100 times CI's
#   make asan | ubsan | tsan  the tests of the ops on the CPU, and the fuzz, under a sanitizer
#   make bench                benchmarks against torch and diffusers            DEVICE=cuda on a machine with a GPU
#   make test-gpu             the tests that need a GPU; fails when there is none
#   make test-emulator        the tests of the PTX emulator that the kernel tests run in
#   make test-abi             one wheel under torch 2.10 and under the newest
#   make gpu-results          info, GPU tests and GPU benchmarks in one file, to send to us
#   make gpu-report           what is known of the kernels without a GPU: docs/gpu-report.md
#   make gallery              pictures of every schedule, weighting and time sampler: docs/gallery.md
#   make mutants              seeded faults in the kernels, each of which the tests must catch
#   make build | lint | format | clean | distclean

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
ARGS ?=
FUZZ ?= 100
# Tests side by side, one thread each: one process a core, of up to 3 GiB (a test holds that).
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')

BIN := $(VENV)/bin
PY := $(BIN)/python

# Read by CMakeLists.txt at every build: warnings are errors here, never in a user's pip install. One architecture is
# enough where kernels are compiled but not run; what runs on a GPU is built for all of them.
export DIFFKERN_DEV ?= 1
GPU_GOALS := test-gpu gpu-results $(if $(filter cuda,$(DEVICE)),demo bench)
ifeq ($(filter $(GPU_GOALS),$(MAKECMDGOALS)),)
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

# The same as build-system.requires in pyproject.toml (a test compares them).
BUILD_REQUIRES := "setuptools>=77" "torch>=2.10" "pybind11>=2.13" "cmake>=3.24" "ninja"

.PHONY: demo test test-all test-long fuzz asan ubsan tsan bench test-gpu test-abi test-emulator gpu-results gpu-report gallery mutants build lint format clean distclean
.DELETE_ON_ERROR:

# ---------------------------------------------------------------------------------------------- environment
$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-requires: pyproject.toml | $(PY)
	$(PY) -m pip install $(BUILD_REQUIRES)
	@touch $@

# One stamp an extra, so that `make demo` does not wait for what only the benchmarks need. The install is editable.
$(VENV)/.extra-%: pyproject.toml setup.py $(VENV)/.build-requires
	$(PY) -m pip install --no-build-isolation --editable ".[$*]"
	@touch $@

# The tests compile the kernels to PTX and run them in an emulator: nvcc comes from PyPI where the machine has none.
$(VENV)/.nvcc: | $(VENV)/.build-requires
	command -v nvcc || $(PY) -m pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*"
	@touch $@
WITH_NVCC = PATH="$$PATH:$$(echo $(abspath $(VENV))/lib/python*/site-packages/nvidia/cu13/bin)"

# No stamp: CMake and ninja know best what changed, and find out in a second.
build: $(VENV)/.build-requires
	$(PY) setup.py --quiet build_ext --inplace

# --------------------------------------------------------------------------------------------------- goals
demo: $(VENV)/.extra-demo build
	$(PY) -m diffkern demo $(if $(filter cuda,$(DEVICE)),--device cuda) $(ARGS)

bench: $(VENV)/.extra-bench build
	$(PY) -m benchmarks --device $(DEVICE) $(ARGS)

# The wheel is built, unpacked beside the tree and put before it: what is tested is what a user installs.
define RUN_TESTS
rm -rf build/wheel build/site
$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
$(PY) -m pip install --quiet --no-deps --target build/site build/wheel/*.whl
$(WITH_NVCC) DIFFKERN_TEST_WHEEL="$$(ls $(CURDIR)/build/wheel/*.whl)" DIFFKERN_SITE=build/site \
  PYTHONPATH=$(CURDIR)/build/site $(BIN)/pytest -n $(JOBS) --dist worksteal -m "$(TESTS)" $(ARGS)
endef
test: TESTS = not full and not long
test-all: TESTS = not long
test-long: TESTS = long

test test-all: $(VENV)/.extra-test $(VENV)/.nvcc
	$(RUN_TESTS)

# Hours: the tests that are too long or too large for CI, the fuzz, the sanitizers, the pictures, every seeded fault.
test-long: $(VENV)/.extra-test $(VENV)/.nvcc
	$(RUN_TESTS)
	$(MAKE) fuzz asan ubsan tsan
	PYTHONPATH=$(CURDIR)/build/site $(PY) tools/gallery.py --output build/gallery
	$(WITH_NVCC) $(PY) tools/mutants.py

fuzz: $(VENV)/.extra-test build
	DIFFKERN_FUZZ=$(FUZZ) $(BIN)/pytest -n $(JOBS) --dist worksteal -m "" tests/fuzz $(ARGS)

# The CPU module is built with the sanitizer into a copy of the package, and tested there (`python -m pytest` would put
# the tree before it; the tests check what DIFFKERN_SITE says they are run on). gcc's runtime has to come
# first in a process that is not built with it, and libstdc++ with it, where it looks for throw; ThreadSanitizer's does
# not stand random addresses.
SANITIZED = tests/ops tests/fuzz/test_ops_valid.py tests/fuzz/test_ops_broken.py -k "not compile and not isa"
RUNTIME = LD_PRELOAD="$$($(CXX) -print-file-name=lib$@.so) $$($(CXX) -print-file-name=libstdc++.so)"
asan: SANITIZER = address
asan: UNDER = $(RUNTIME) ASAN_OPTIONS=malloc_context_size=2 LSAN_OPTIONS=suppressions=$(CURDIR)/tests/sanitizers/lsan.txt
ubsan: SANITIZER = undefined
ubsan: UNDER = $(RUNTIME) UBSAN_OPTIONS=print_stacktrace=1
tsan: SANITIZER = thread
tsan: UNDER = setarch -R env OMP_NUM_THREADS=4 $(RUNTIME) \
  TSAN_OPTIONS=suppressions=$(CURDIR)/tests/sanitizers/tsan.txt:ignore_noninstrumented_modules=1
asan ubsan tsan: $(VENV)/.extra-test
	rm -rf build/$@/site
	mkdir -p build/$@/site
	tar c --exclude='*.so' --exclude=__pycache__ diffkern | tar x -C build/$@/site
	PATH="$(abspath $(BIN)):$$PATH" DIFFKERN_DEV=0 cmake -S . -B build/$@/cmake -G Ninja \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -DDIFFKERN_CUDA=off -DDIFFKERN_SANITIZE=$(SANITIZER) \
	  -DDIFFKERN_OUTPUT_DIR=$(CURDIR)/build/$@/site/diffkern
	$(BIN)/cmake --build build/$@/cmake
	DIFFKERN_SITE=build/$@/site PYTHONPATH=$(CURDIR)/build/$@/site $(UNDER) $(PY) $(BIN)/pytest -p no:cacheprovider \
	  $(SANITIZED) $(ARGS)

test-gpu: $(VENV)/.extra-test build
	$(BIN)/pytest --gpu $(ARGS)

test-abi: $(VENV)/.extra-test
	$(PY) tests/abi_check.py $(ARGS)

# The PTX emulator's own tests (minutes; needs nvcc).
test-emulator: $(VENV)/.extra-test $(VENV)/.nvcc
	$(WITH_NVCC) $(BIN)/pytest -n $(JOBS) --dist worksteal tests/ptxsim $(ARGS)

gpu-results: $(VENV)/.extra-test $(VENV)/.extra-bench build
	@mkdir -p build
	{ failed=0; $(PY) -m diffkern info || failed=1; $(BIN)/pytest --gpu -q || failed=1; \
	  $(PY) -m benchmarks --device cuda $(ARGS) || failed=1; exit $$failed; } 2>&1 | tee build/gpu-results.txt; \
	  status=$${PIPESTATUS[0]}; echo "written: build/gpu-results.txt"; exit $$status

gpu-report: $(VENV)/.extra-test $(VENV)/.nvcc
	$(PY) -m pip install --quiet "nvidia-cuda-cuobjdump" "nvidia-cuda-nvdisasm"
	$(WITH_NVCC) $(PY) tools/gpu_report.py $(ARGS)

gallery: $(VENV)/.extra-demo build
	$(PY) tools/gallery.py $(ARGS)

mutants: $(VENV)/.extra-test $(VENV)/.nvcc
	$(WITH_NVCC) $(PY) tools/mutants.py $(ARGS)

LINT_CPP = $$(git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu')

lint: $(VENV)/.extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(LINT_CPP)

format: $(VENV)/.extra-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(LINT_CPP)

clean:
	rm -rf build dist *.egg-info diffkern/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
