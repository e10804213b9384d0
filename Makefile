# Two commands set everything up: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench results clean

help:  ## what each target does
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install everything, once

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch triton
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## the main job: align a small model under thresholds, within ten minutes
	$(BIN)/mopo demo --output runs/demo

test: lint  ## lint, then every test that is not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" tests

test-slow: $(STAMP)  ## the minutes-long checks
	$(BIN)/python -m pytest -m slow tests

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## benchmarks, half an hour: they measure and assert nothing about time; tables and plots in runs/bench
	$(BIN)/python -m bench.cpu.run runs/bench

results: $(STAMP)  ## tables and pictures of docs/results.md and docs/sampling.md, made again from the committed runs
	$(BIN)/python -m bench.studies.tabular.report bench/results/tabular
	$(BIN)/python -m bench.studies.lab.report bench/results/lab docs/results.md
	$(BIN)/python -m bench.studies.real_model.report bench/results/real_model docs/results.md
	$(BIN)/python -m bench.studies.sampled_training bench/results/sampling docs/sampling.md --minutes 0

clean:  ## remove build outputs, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
