# make install | demo | demo-scratch | check | test: each does all the set-up it needs. PYTHON= names the interpreter for a new .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE_SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*' -not -path 'csrc/bench/*') CMakeLists.txt setup.py
SANITIZED := build/sanitized
EMULATED := build/emulated
CORE_TESTS := $(addprefix tests/,common ops model checkpoint data folding decode test_imports.py) \
	$(patsubst %,tests/train/test_%.py,losses data guard permutation recipe paper_recipes flops) \
	$(patsubst %,tests/eval/test_%.py,scoring simulate local_tasks)

.PHONY: install demo demo-scratch lint check test test-ops test-page test-real test-cpp clean

install: $(STAMP)

# torch first: it is built against, and on a machine without CUDA its CPU build is enough.
$(STAMP): pyproject.toml constraints.txt $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m rrt.info
	touch $@

demo: install
	bash runs/demo.sh

demo-scratch: install
	bash runs/demo_scratch.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick answer while working: the package's own tests, and of the trainer and evaluation what computes.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal $(CORE_TESTS)

test: lint test-cpp test-ops test-page
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# The operators again: with the kernels of each narrower instruction set that the CPU has, then with references alone.
test-ops: export OMP_NUM_THREADS = 1
test-ops: install
	widest=$$($(BIN)/python -c 'from rrt.ops import build_info; print(build_info().cpu_isa)'); \
	for isa in baseline avx2 avx512 avx512_bf16; do [ $$isa != "$$widest" ] || break; \
	RRT_CPU_ISA=$$isa $(BIN)/python -m pytest -q -m isa -k 'not reference' tests/ops || exit 1; done
	RRT_NATIVE=0 $(BIN)/python -m pytest -q -m fallback tests/ops tests/decode

# The server's page in a browser: Chromium, whose path RRT_CHROMIUM may name.
test-page: install
	@for browser in $$RRT_CHROMIUM chromium chromium-browser google-chrome; do found="$$found$$(command -v $$browser)"; done; \
	if [ -z "$$found" ]; then echo "no Chromium: the tests of the page are left out"; exit 0; fi; \
	set -x; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/serve/http

# What needs a pretrained model (RRT_REAL_MODEL) and real data (RRT_REAL_DATA): see docs/BUILDING.md.
test-real: install
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m real

# The C++ tests of kernels and planning, under the address and undefined-behaviour sanitizers; then the bodies of the
# CUDA kernels, lane by lane on the CPU, and what the compiled ones take of a multiprocessor.
test-cpp: install
	@for cxx in $${CXX:-c++ g++ clang++}; do found="$$found$$(command -v $$cxx)"; done; \
	if [ -z "$$found" ]; then echo "no C++ compiler: the C++ tests are left out"; exit 0; fi; \
	set -ex; \
	PATH="$$PWD/$(BIN):$$PATH"; \
	cmake -S . -B $(SANITIZED) -G Ninja --log-level=WARNING -DRRT_SANITIZE=address,undefined; \
	cmake --build $(SANITIZED) -- --quiet; \
	ctest --test-dir $(SANITIZED) --output-on-failure -j 2; \
	cmake -S . -B $(EMULATED) -G Ninja --log-level=WARNING -DRRT_WITH_TORCH=0 -DRRT_WITH_PYTHON=0 -DRRT_WITH_CUDA=0; \
	cmake --build $(EMULATED) --target test_cuda_decode test_cuda_attention test_cuda_prefill list_launches -- --quiet; \
	ctest --test-dir $(EMULATED) --output-on-failure -j 2 -L emulation; \
	$(BIN)/python bench/kernel_resources.py

clean:
	rm -rf $(VENV) build runs/out bench/out rrt/_native.so rrt/_plan*.so rrt/_*_failed.txt
