# `make fit` and `make test` are all that a newcomer needs; both set up .venv in this checkout first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RECIPE ?= recipes/int8_sdpa.yaml

.PHONY: fit test test-fast lint lowest docs clean
.DEFAULT_GOAL := fit

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

fit: $(VENV)/.ready
	$(PY) -m vit_efficient.fit --recipe $(RECIPE) $(ARGS)

test: $(VENV)/.ready
	$(PY) -m pytest -q -m 'not slow' tests/unit tests/recipes tests/kernels $(ARGS)
	$(PY) -m pytest -q -m 'not slow' tests/integration $(ARGS)
	$(PY) -m pytest -q -m 'not slow' tests/slurm $(ARGS)
	$(PY) -m pytest -q -m slow $(ARGS)

test-fast: $(VENV)/.ready
	$(PY) -m pytest -q -m 'not slow' tests/unit tests/recipes $(ARGS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# The lower bounds of pyproject.toml, installed and tested; slow, and not part of CI.
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(d.replace('>=', '==') for d in p['dependencies'] + p['optional-dependencies']['dev']), sep='\n')" > $(VENV)-lowest/bounds.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-lowest/bounds.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(VENV)-lowest/bin/python -m pytest -q -m 'not slow' tests/unit tests/recipes

docs: $(VENV)/.ready
	$(PY) -m vit_efficient.recipe.document

clean:
	rm -rf $(VENV) $(VENV)-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
