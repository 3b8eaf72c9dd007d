# Every target sets up what it needs: an environment is made when it is missing or older than its pins, else reused.
PYTHON ?= python3
BIN := .venv/bin
OLDEST_BIN := .venv-oldest/bin

.PHONY: help test test-oldest demo bench lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

test: .venv/ready lint  ## check the style and run the tests
	$(BIN)/python -m pytest -q

test-oldest: .venv-oldest/ready  ## run the adapters' tests under the oldest supported transformers
	$(OLDEST_BIN)/python -m pytest -q tests/models

demo: .venv/ready  ## route a photo through a tiny model; ARGS="--model ... --image ..." for others
	$(BIN)/python -m reroute_kernels demo $(ARGS)

bench: .venv/ready  ## run the benchmarks on a CPU; rewrites bench/results/cpu and the tables in README.md
	$(BIN)/python -m pytest --benchmark -q --benchmark-json=bench/results/cpu/benchmarks.json
	$(BIN)/python -m bench.report

lint: .venv/ready
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .

format: .venv/ready  ## format the code
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-oldest build *.egg-info .benchmarks

.venv/ready: requirements/dev.txt pyproject.toml
.venv-oldest/ready: requirements/oldest.txt pyproject.toml
.venv/ready .venv-oldest/ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $<
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
