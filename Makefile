# Needs Python 3.11 or newer with its venv module, and nothing else: `make quickstart` and `make test` work in a fresh clone.
# Another Python:            make test PYTHON=python3.12
# PyTorch from elsewhere:    make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

.PHONY: help venv test test-slow matrix audit lint quickstart clean

help:
	@echo "make quickstart  set up, train a small CoCa on real pictures, and show what it learned (outputs/quickstart/)"
	@echo "make test        run the quick tests"
	@echo "make test-slow   run all tests"
	@echo "make matrix      run the quick tests on the oldest and the newest supported PyTorch and transformers"
	@echo "make audit       ask PyPI for known weaknesses of the installed packages"
	@echo "make lint        check style with ruff"
	@echo "make venv        set up the development environment in $(VENV)"
	@echo "make clean       delete $(VENV), caches and build outputs; outputs/ stays"

venv: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(RUN) -m pytest

test-slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -m "not gpu"

matrix:
	$(PYTHON) tests/matrix.py $(MATRIX)

audit: $(VENV)/.installed-dev
	$(PIP) pip-audit
	$(RUN) -m pip_audit --skip-editable

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

quickstart: $(VENV)/.installed-quickstart
	$(RUN) examples/quickstart/run.py --output_dir outputs/quickstart

clean:
	rm -rf $(VENV) .venv-matrix build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, renewed when pyproject.toml changes
$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	@echo "==> [2/3] PyTorch (large: minutes the first time)"
	@$(PIP) torch torchvision
	@echo "==> [3/3] modeling_coca[$*]"
	@$(PIP) --editable ".[$*]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("%s is Python %d.%d: modeling_coca needs 3.11 or newer (make PYTHON=...)" % ("$(PYTHON)", *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	@echo "==> [1/3] virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

.SECONDARY: $(VENV)/.created
