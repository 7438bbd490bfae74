VENV ?= .venv
PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Tests of real processes wait a lot: more of them run at a time than there are cores.
PYTEST_PROCESSES ?= 4
CHAOS_PROCESSES ?= 3
CHAOS_ARGS ?=
BENCH_ARGS ?=
CHAOS_SEED ?= $(shell python3 -c 'import random; print(random.randrange(10**9))')

# What Python has compiled is kept: the tests start some thousand processes, each of which would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

bin := $(VENV)/bin
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: bench bench-full chaos demo docs test lint clean venv
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(bin)/cluster-tasks demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	@$(bin)/python -m pytest --numprocesses $(PYTEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

# What measures times or fills the machine runs first and alone. Of the others the longest begin first.
chaos: $(VENV)/.installed-dev
	@seed=$(CHAOS_SEED); status=0; \
	for part in "-m timed" "-m 'not timed' --numprocesses $(CHAOS_PROCESSES) --dist loadfile --no-loadscope-reorder"; do \
		eval "$(bin)/python -m pytest tests/chaos --chaos full --chaos-seed $$seed $$part $(CHAOS_ARGS)" || status=1; \
	done; exit $$status

# A short version of each benchmark, and the long one. Nothing else should run meanwhile.
bench: $(VENV)/.installed-bench
	@$(bin)/python -m benchmarks $(BENCH_ARGS)

bench-full: $(VENV)/.installed-bench
	@$(bin)/python -m benchmarks --full $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	@$(bin)/ruff check
	@$(bin)/ruff format --check
	@$(bin)/mypy
	@$(bin)/lint-imports
	@$(bin)/interrogate --quiet cluster_tasks workers \
		|| { echo "Without a docstring:"; $(bin)/interrogate -vv cluster_tasks workers | grep MISSED; false; }

# Into site/. A link that leads nowhere, or a page that is in no menu, ends it.
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=true $(bin)/mkdocs build --strict --quiet

venv: $(VENV)/.installed-dev

clean:
	@test ! -e $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	@rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist site

$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once"
	@$(pip) --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once, with what the tests need"
	@$(pip) --editable '.[all,dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once, with what the benchmarks compare with"
	@$(pip) --editable '.[all,benchmarks]'
	@touch $@ $(VENV)/.installed

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: name one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
