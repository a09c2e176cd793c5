# Needs Python 3.11 or later with its venv module, and make; nothing is installed outside .venv (and .venv-lowest, .venv-audit).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
# -qq shows errors only.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input --no-build-isolation -c

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-lowest conformance lint docs audit benchmark clean package

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP) ## Make .venv with the tested versions (constraints.txt), once

# A whole .venv is kept and completed; one whose making was cut short, and so without a working pip, is made anew.
# setuptools comes first and by itself: pip ignores constraints in the isolated environment it would build with.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DuoStream needs Python 3.11 or later: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing the versions in constraints.txt into .venv (a minute or more)"
	@$(BIN)/python $(PIP_INSTALL) constraints.txt setuptools
	@$(BIN)/python $(PIP_INSTALL) constraints.txt -e '.[dev]'
	@touch $@

quickstart: setup ## Train a small model from nothing and show what it does
	$(BIN)/duostream quickstart --output_dir runs/quickstart

# Tiny models gain nothing from a second thread: one each, and the tests of a class or module stay together, in their
# order: by itself xdist leaves those of few tests, which are the long ones, for the end, where one worker has them all
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder
test test-fast test-lowest: export OMP_NUM_THREADS = 1

test: setup ## Run all tests
	$(BIN)/python $(PYTEST)

test-fast: setup ## Run the tests that take seconds
	$(BIN)/python $(PYTEST) -m "not slow"

# On the oldest versions that pyproject.toml allows, which have no wheels for Python 3.13 and later
test-lowest: .venv-lowest/.stamp ## Run the tests that take seconds with the lowest versions
	.venv-lowest/bin/python $(PYTEST) -m "not slow"

.venv-lowest/.stamp: pyproject.toml constraints-lowest.txt
	@$(PYTHON) -m venv --clear .venv-lowest
	@echo "Installing the versions in constraints-lowest.txt into .venv-lowest (several minutes)"
	@.venv-lowest/bin/python $(PIP_INSTALL) constraints-lowest.txt setuptools
	@.venv-lowest/bin/python $(PIP_INSTALL) constraints-lowest.txt -e '.[test]'
	@touch $@

conformance: setup ## Fetch the tests that transformers has for its own models and run them
	$(BIN)/python tests/conformance/library_tests.py
	$(BIN)/python -m pytest tests/conformance -q -r fE

# The links are made each time, for modules that came or went. They lay the folders out as the installed package
# does, which neither mypy (see pyproject.toml) nor mkdocs has a setting for.
package:
	@rm -rf build/package && mkdir -p build/package/duostream
	@cd build/package/duostream && ln -s ../../../duostream/* $(addprefix ../../../,configuration modeling processing scripts) .

lint: setup package ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup package ## Build the API page (build/docs/index.html) from the docstrings
	$(BIN)/mkdocs build --strict --quiet -f docs/mkdocs.yml

# In an environment of its own, which none of the versions in constraints.txt has to fit
audit: setup ## Look at licences, and ask PyPI for known weaknesses of the tested versions
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1 pip-licenses==5.5.5
	.venv-audit/bin/pip-licenses --python $(BIN)/python --partial-match --fail-on "GPL;UNKNOWN" --summary
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

benchmark: setup ## Measure speed and memory
	$(BIN)/duostream benchmark speed

clean: ## Remove build output and caches (not .venv, not runs)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
