# make install | demo | test: each does all the set-up it needs. PYTHON= names the interpreter for a new .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: install demo test clean

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

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -q

clean:
	rm -rf $(VENV) build runs/out bench/out rrt/_native.so
