# `make fit` and `make test` are all that a newcomer needs; both set up .venv in this checkout first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RECIPE ?= recipes/int8_sdpa.yaml
JOBS ?= 2
GROUPS := test-units test-runs test-slurm test-kills test-ranks test-rest
test $(GROUPS) test-fast test-long: export OMP_NUM_THREADS ?= 1

.PHONY: fit test $(GROUPS) test-fast test-gpu test-long lint lowest docs clean
.DEFAULT_GOAL := fit

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

fit: $(VENV)/.ready
	$(PY) -m vit_efficient.fit --recipe $(RECIPE) $(ARGS)

# Fast groups first, JOBS tests at a time, each with OMP_NUM_THREADS threads; one Slurm cluster, so one test at a time.
# Each group has a budget, three to four times what it takes on two idle cores; a group that exceeds it fails, and so does
# a test that takes ten minutes (`timeout` in pyproject.toml). Tests of a file share what they made once (`loadfile`).
# CI, which is ended at a given time, sets UNTIL (seconds since 1970): on a slow machine the last groups, which could not
# end by then, are left out, and said to be.
SLOW := slow and not long
KILLS := tests/integration/test_faults.py tests/integration/test_fault_files.py tests/integration/test_resume.py \
  tests/integration/test_skipped.py tests/integration/test_torchrun.py
RANKS := tests/integration/test_ddp.py tests/integration/test_fsdp.py tests/integration/test_fsdp_layers.py \
  tests/integration/test_deepspeed.py
TIMED := timeout --foreground --verbose --signal=INT --kill-after=30s
MANY := $(PY) -m pytest -q -n $(JOBS) --durations=12

# If there are $(1) minutes until then, $(2).
IF_TIME = @if [ $$(( ($${UNTIL:-4102444800} - $$(date +%s)) / 60 )) -ge $(1) ]; then set -x; $(2); \
  else echo "NOT RUN for lack of time: $@. It may take $(1) minutes, and CI would be ended before."; fi

test: $(GROUPS)

test-units: $(VENV)/.ready
	$(TIMED) 30m $(MANY) -m 'not slow' tests/unit tests/recipes tests/kernels $(ARGS)

test-runs: $(VENV)/.ready
	$(TIMED) 40m $(MANY) --dist loadfile -m 'not slow' tests/integration $(ARGS)

test-slurm: $(VENV)/.ready
	$(call IF_TIME,24,$(TIMED) 30m $(PY) -m pytest -q --durations=12 -m 'not long' tests/slurm $(ARGS))

test-kills: $(VENV)/.ready
	$(call IF_TIME,26,$(TIMED) 30m $(MANY) --dist loadfile -m '$(SLOW)' $(KILLS) $(ARGS))

test-ranks: $(VENV)/.ready
	$(call IF_TIME,26,$(TIMED) 30m $(MANY) --dist loadfile -m '$(SLOW)' $(RANKS) $(ARGS))

test-rest: $(VENV)/.ready
	$(call IF_TIME,24,$(TIMED) 30m $(MANY) -m '$(SLOW)' tests/unit tests/recipes tests/kernels tests/integration \
	  $(addprefix --ignore=,$(KILLS) $(RANKS)) $(ARGS))

# What CI leaves out; the last results are in docs/faults.md.
test-long: $(VENV)/.ready
	$(PY) -m pytest -q -m long $(ARGS)

# On a machine with a GPU, or two. Kernels and models many at a time; runs in processes of their own, few: those of two
# GPUs wait for each other whenever something else has either.
test-gpu: $(VENV)/.ready
	$(PY) -m pytest -q -n 16 --dist worksteal -m gpu tests --ignore=tests/integration $(ARGS)
	$(PY) -m pytest -q -n 4 -m gpu tests/integration $(ARGS)

test-fast: $(VENV)/.ready
	$(MANY) -m 'not slow' tests/unit tests/recipes $(ARGS)

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
