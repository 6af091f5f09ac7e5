# Needs python3 (3.11 or newer) with pip and venv; everything else is installed into .venv by the first target run.
# pip takes the pinned torch from the index it is configured for; a CPU build of the same version serves as well.
PYTHON ?= python3
VENV := .venv
# The name of the stamp changes when the requirements do, whatever the files' dates say.
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-upstream wheel wheel-test quality style clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[train,test,quality]"
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: $(STAMP)  ## distil the bundled teacher, print the table, write demo/evaluation/grid.png
	HF_HUB_OFFLINE=1 $(VENV)/bin/python training/distill_lcm.py --recipe training/recipes/lcm_demo.args
	HF_HUB_OFFLINE=1 $(VENV)/bin/python training/evaluate.py --recipe training/recipes/evaluate_demo.args
	@echo "Samples: demo/evaluation/grid.png   Student: demo/student/pipeline   Table: demo/evaluation/table.md"

test: $(STAMP)  ## the default suite, two processes
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -q

test-slow: $(STAMP)  ## the longer training proofs
	$(VENV)/bin/python -m pytest -m slow

test-upstream: $(STAMP)  ## diffusers' own suites on our classes: make test-upstream DIFFUSERS=/path/to/its/checkout
	@test -n "$(DIFFUSERS)" || { echo "make: name a diffusers checkout: make test-upstream DIFFUSERS=/path/to/diffusers" >&2; exit 1; }
	$(VENV)/bin/python tests/outside/run.py $(DIFFUSERS) -n 2

wheel: $(STAMP)  ## build the source distribution, and from it the wheel, into dist/
	rm -rf dist
	$(VENV)/bin/python -m build

wheel-test: wheel  ## install the wheel in an empty environment and use it from an empty folder
	PYTHON=$(VENV)/bin/python tests/outside/use_wheel.sh dist/*.whl

quality: $(STAMP)  ## check lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: $(STAMP)  ## fix lint and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove caches and build output (.venv, data, runs and demo stay)
	rm -rf .pytest_cache .ruff_cache build dist
	find src tests training pipelines benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
