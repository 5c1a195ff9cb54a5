# The whole project from a fresh Debian or Ubuntu machine with Python and a compiler:
#   make demo    the main job on real text, with a table and a picture
#   make test    everything that must hold
# See CONTRIBUTING.md for the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
OUT ?= out

# One thread per test process: the processes share the processors already.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS)
SOURCES := CMakeLists.txt pyproject.toml scripts/build_kernels.sh $(shell find cmake include kernels python -type f \
	-not -path '*/__pycache__/*')
CPP_FILES = $(shell git ls-files '*.h' '*.cc' '*.cuh' '*.cu')
# Of the CUDA backend, where there is an nvcc: one architecture, to save time; "native" is this machine's.
CUDAARCHS ?= 90

.PHONY: setup build demo test test-all bench gpu lint format sanitize wheel cuda-all clean

# --- setting up

setup: $(VENV)/setup.stamp
build: $(VENV)/build.stamp

$(VENV)/setup.stamp: requirements.txt requirements-dev.txt scripts/install_packages.sh
	bash scripts/install_packages.sh libhwy-dev libgtest-dev python3-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt \
		-r requirements-dev.txt
	touch $@

$(VENV)/build.stamp: $(VENV)/setup.stamp $(SOURCES)
	PYTHON=$(BIN)/python CUDAARCHS="$(CUDAARCHS)" bash scripts/build_kernels.sh --quiet \
		--disable-pip-version-check
	$(BIN)/python -m select_attn_ops info
	touch $@

# --- using

demo: build
	mkdir -p $(OUT)
	$(BIN)/python experiments/1_real_text/demo_real_text.py --output $(OUT)/demo_real_text.png

# With the libraries to compare with where they can be downloaded and built, and with the options in
# BENCH: `make bench BENCH=--realtime`.
bench: build
	mkdir -p $(OUT)
	if PYTHON=$(BIN)/python bash scripts/build_peers.sh build/peers; then peers="--peers build/peers"; fi; \
		$(BIN)/python -m select_attn_ops bench $(BENCH) $$peers --json $(OUT)/bench.json \
			--plot $(OUT)/bench.png

# On a machine with a GPU: tests, sanitizer and benchmark in one run, with the package that is
# installed, or with WHEEL=<file>. Needs no network.
gpu:
	PYTHON=$(firstword $(abspath $(wildcard $(BIN)/python)) $(PYTHON)) OUT=$(OUT)/gpu \
		bash scripts/gpu.sh $(WHEEL)

# --- testing

test: test-cpp-test build wheel
	$(BIN)/python -m pytest -q --doctest-modules --pyargs select_attn_ops
	$(PYTEST) -q tests experiments

# 10,000 property cases per operator and the whole sweeps of the experiments.
test-all: test-cpp-test build wheel
	$(BIN)/python -m pytest -q --doctest-modules --pyargs select_attn_ops
	$(PYTEST) -q tests --hypothesis-profile=full
	$(PYTEST) -q experiments --full-sweeps

# The C++ tests of each CMake preset. The package comes first, because tvm-ffi brings DLPack's header.
CPP_BUILDS := test asan tsan
# Where there is an nvcc, the tests' build has the CUDA backend too, for the sake of its warnings.
build-cpp-test: WITH_CUDA := $(if $(shell command -v "$${CUDACXX:-nvcc}"),-DSELECT_ATTN_CUDA=ON)
$(CPP_BUILDS:%=build-cpp-%): build-cpp-%: build
	mkdir -p build
	CUDAARCHS="$(CUDAARCHS)" $(BIN)/cmake --preset $* $(WITH_CUDA) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DSELECT_ATTN_DLPACK_INCLUDE_DIR=$$($(BIN)/python -m tvm_ffi.config --dlpack-includedir) \
		> build/$*.log 2>&1 || { cat build/$*.log; exit 1; }
	$(BIN)/cmake --build build/$*

$(CPP_BUILDS:%=test-cpp-%): test-cpp-%: build-cpp-%
	$(BIN)/ctest --test-dir build/$* --output-on-failure

sanitize: test-cpp-asan test-cpp-tsan

# --- checking the text

lint: build-cpp-test
	bash scripts/install_packages.sh clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	git ls-files '*.cc' | grep -v -e '^tests/consumer/' -e '^scripts/peers/' -e '/tvm_ffi.cc$$' -e '/cuda/backend.cc$$' | \
		xargs -P $(JOBS) -n 2 clang-tidy -p build/test --quiet --warnings-as-errors='*'

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# --- packaging

# A wheel that carries Highway and runs on any Python; tvm-ffi stays a dependency. It has the CPU backend
# alone, whatever the machine that builds it.
wheel: $(VENV)/wheel.stamp

$(VENV)/wheel.stamp: $(VENV)/setup.stamp $(SOURCES)
	rm -rf dist build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude libtvm_ffi.so \
		--wheel-dir dist build/wheel/*.whl
	touch $@

# The same with the CUDA backend, for every architecture that the nvcc found is to build for.
cuda-all: setup
	rm -rf dist/cuda build/wheel-cuda
	env -u CUDAARCHS $(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel-cuda \
		-C cmake.define.SELECT_ATTN_CUDA=ON -C cmake.define.SELECT_ATTN_WERROR=ON .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude libtvm_ffi.so \
		--wheel-dir dist/cuda build/wheel-cuda/*.whl

clean:
	rm -rf build dist $(OUT) $(VENV)
