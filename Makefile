# Everything a newcomer needs. PYTHON chooses the interpreter (3.11 or newer); ARGS goes to the command.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The MLX backend runs on Macs and, for tests, on Linux.
EXTRAS := $(if $(filter Darwin Linux,$(shell uname -s)),mlx,)

.PHONY: help setup setup-dev train test test-slow check format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed: install it (Debian, Ubuntu: python3-venv)"; exit 1; }

$(VENV)/.setup: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what this machine needs (a minute or more)"
	$(PIP) -e .
	@touch $@

$(VENV)/.setup-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing both backends and the test tools (a minute or more)"
	$(PIP) -e ".[dev,cuda$(if $(EXTRAS),$(comma)$(EXTRAS),)]"
	@touch $@ $(VENV)/.setup

comma := ,

setup: $(VENV)/.setup  ## install what this machine needs
setup-dev: $(VENV)/.setup-dev  ## install both backends and the test tools

train: $(VENV)/.setup  ## fine-tune SmolLM2 on the shipped questions: make train ARGS="--backend mlx"
	$(BIN)/python cli.py train --preset quickstart $(ARGS)

test: $(VENV)/.setup-dev  ## run the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.setup-dev  ## run the benchmarks in small, which make test leaves out
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.setup-dev  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/.setup-dev  ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what make made, but no runs
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
