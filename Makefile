# Two commands: `make demo` and `make test`. Each makes its own environment first, once.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test lint check clean

demo: $(VENV)/.installed
	$(BIN)/fedeat demo --out $(OUT)

# One thread a process: on few cores, torch with several is slower than with one.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadscope

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: test lint

# The C source is here too, so that an installation in place is built anew when it changes.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt src/fedeat/geometry/_products.c
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,flower]'
	touch $@

clean:
	rm -rf $(VENV)
